"""Tests of tmax.py: the algorithm against independent references, harness and sandbox, a real engine, whole tiny runs.

    bash run.sh test               the default suite
    bash run.sh test -m slow       learning with three seeds
    bash run.sh test -m bench -s   benchmarks: they print, they assert nothing about time
    bash run.sh test -m gpu        checks that need a CUDA device (vLLM not needed)
"""
import asyncio
import base64
import contextlib
import copy
import dataclasses
import functools
import hashlib
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

import tmax

PROPERTY = settings(max_examples=150, deadline=None, database=None)
PAD, EOS, VOCAB = 0, 1, 32      # of the small model below
LOSSES = ["dppo_tv", "dppo_kl", "grpo", "pg"]
# Total tokens of 444 real Terminal-Bench 2.0 rollouts of the 9B model (RL caps them at 34,816), sorted.
REAL_LENGTHS = [int(n) for n in """
1511 1658 1706 1738 1870 2704 3262 3348 3385 3699 4152 4225 4397 4449 4620 4742 4789 4814 4856 5125 5194 5406
5414 5466 5486 5544 5590 6021 6040 6122 6276 6408 6829 6929 7672 7996 8102 8241 8289 8668 9121 9186 9244 9254
9299 9338 9479 9520 9573 9622 9753 10112 10198 10209 10269 10599 10890 10964 11265 11317 11406 11797 12244 12547
12601 12636 12945 13281 13686 13916 13923 14077 14104 14418 14494 14946 14958 15074 15247 15418 15698 15808
15818 15836 15911 15957 15964 16065 16119 16622 16701 17009 17208 17367 17384 17393 17437 17719 17721 17809
17959 18217 18532 18536 18661 18821 18848 18898 18959 18964 19023 19059 19597 19698 19754 19782 20275 20455
20524 20556 20601 20601 20703 20922 20958 21105 21134 21138 21180 21439 21487 21825 21894 22166 22184 22201
22321 22503 22504 22700 22720 22846 22922 22922 22931 23181 23205 23241 23318 23365 23430 23541 23658 23789
23875 23942 24303 24830 24843 25377 25510 25819 25840 25912 25968 26116 26348 26492 26547 26583 26942 26951
26980 26983 27077 27201 27295 27480 27546 27614 27615 27703 27853 27887 27976 28079 28506 28734 28940 29002
29203 29234 29379 29903 29990 29995 30136 30224 30316 30327 30388 30444 30461 30613 30619 30696 30766 30805
30823 30860 31394 31394 31510 31568 31637 31704 31725 31830 31885 32090 32097 32311 32518 32615 32675 32719
32832 33135 33225 33294 33328 33450 33628 33862 33970 34246 34337 34601 34733 35377 35648 35732 35935 36084
36222 36307 36346 36522 36625 36706 36798 37121 37660 37949 38044 38054 38197 38351 38436 38441 38455 38537
38643 38653 38729 38788 38867 38899 38967 39009 39096 39260 39312 39419 39459 39630 39768 39877 39936 40016
40032 40076 40225 40290 40290 40297 40420 40455 40804 40841 40948 41158 41235 41241 41271 41302 41303 41561
41575 41769 41787 41801 41809 41864 41906 42018 42105 42134 42159 42346 42416 42633 42687 42700 42716 42871
42934 42937 42976 43084 43324 43356 43429 43506 43556 43657 43699 43706 43925 44036 44077 44102 44161 44194
44199 44254 44319 44613 44625 44640 44678 44742 44758 44801 44863 44985 45002 45016 45074 45103 45136 45229
45260 45397 45480 45544 45633 45689 45696 45786 45997 46010 46219 46263 46367 46638 46720 46815 47113 47119
47128 47281 47661 47689 47785 47902 47913 48095 48236 48312 48327 48381 48454 48551 48609 48951 49107 49150
49344 49448 49457 49511 49675 49715 49736 49750 49838 50146 50592 50725 50755 50793 50952 51110 51387 51402
51477 51513 51760 51813 51889 52141 52372 52397 52435 52537 52673 52908 52963 52990 53206 53289 53375 53612
53856 54116 54416 54535 54669 54871 54912 55153 55484 55570 56707 56939 57294 57775 59042 59683 62570 62995
63634 65342""".split()]


# ---------------------------------------------------------------------------------------------------------------------
# The losses: 100,000 random tokens against the equations in plain Python
# ---------------------------------------------------------------------------------------------------------------------

def equation(loss, logp, logmu, advantage, delta=0.1, low=0.2, high=0.272):
    """One token by DPPO's equations 11 to 14, PPO's clip, or none: (D or r as compared, M, loss, d loss / d log pi)."""
    pi, mu, r = math.exp(logp), math.exp(logmu), math.exp(logp - logmu)
    if loss == "dppo_tv":
        size = abs(mu - pi)
    elif loss == "dppo_kl":
        term = lambda a, log_ratio: a * log_ratio if a > 0 else 0.0
        not_pi = -math.expm1(logp)
        size = term(mu, logmu - logp) + term(1 - mu, math.log((1 - mu) / not_pi) if mu < 1 and not_pi > 0 else math.inf)
    else:
        size = r
    if loss.startswith("dppo"):
        outside = size > delta and ((advantage > 0 and r > 1) or (advantage < 0 and r < 1))
        value = 0.0 if outside else -r * advantage
    elif loss == "grpo":
        outside = (advantage > 0 and r > 1 + high) or (advantage < 0 and r < 1 - low)
        value = -min(r * advantage, min(max(r, 1 - low), 1 + high) * advantage)
    else:
        outside, value = False, -r * advantage
    return size, not outside, value, 0.0 if outside else -r * advantage


def random_tokens(n, dtype, seed=0):
    """log pi, log mu, A: all sizes, many near each other, and the corners pi = 0, mu = 1, pi = 1, pi = mu, A = 0."""
    g = torch.Generator().manual_seed(seed)
    uniform = lambda: torch.rand(n, generator=g, dtype=torch.float64)
    mu = torch.where(uniform() < 0.5, uniform(), (-20 * uniform()).exp()).clamp(1e-9, 1)
    pi = torch.where(uniform() < 0.6, mu + 0.4 * (uniform() - 0.5), uniform()).clamp(1e-9, 1)
    advantage = 2 * uniform() - 1
    corner = torch.randint(0, 40, (n,), generator=g)
    logp, logmu = pi.log(), mu.log()
    logp[corner == 0] = -math.inf
    logmu[corner == 1] = 0.0
    logp[corner == 2] = 0.0
    logp[corner == 3] = logmu[corner == 3]
    advantage[corner == 4] = 0.0
    logp[:2], logmu[:2], advantage[:2] = torch.tensor([-math.inf, 0.0]), 0.0, torch.tensor([-0.5, 0.5])
    return [x.to(dtype) for x in (logp, logmu, advantage)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_equals_equations(loss, dtype, tolerance):
    """Mask, value and gradient of each --loss on 100,000 tokens; in float32 without those within 1e-6 of the threshold."""
    logp, logmu, advantage = random_tokens(100_000, dtype)
    logp.requires_grad_()
    value, kept = tmax.policy_loss(tmax.Config(loss=loss), logp, logmu, advantage)
    gradient, = torch.autograd.grad(value.sum(), logp)
    tokens = zip(logp.tolist(), logmu.tolist(), advantage.tolist())
    size, mask, values, gradients = (torch.tensor(x, dtype=torch.float64) for x in zip(*(equation(loss, *t) for t in tokens)))
    clear = torch.ones_like(size, dtype=torch.bool)
    if dtype == torch.float32:
        for bound in [0.1] if loss.startswith("dppo") else [0.8, 1.272]:
            clear &= (size - bound).abs() > 1e-6
    assert clear.double().mean() > 0.999
    assert (kept.double() != mask)[clear].sum() == 0
    for found, wanted in [(value, values), (gradient, gradients)]:
        assert ((found.double() - wanted).abs() <= tolerance * wanted.abs())[clear].all()
    for sign in (-1, 1) if loss != "pg" else ():     # the masks of both signs are at work
        assert 0.05 < mask[advantage.sign() == sign].mean() < 0.95


def test_threshold_is_strict():
    """A token at exactly the threshold is kept, one a hair beyond it is not."""
    mu, pi, advantage = torch.tensor([0.5]).double().log(), torch.tensor([0.75]).double().log(), torch.ones(1).double()
    tv = abs(float(mu.exp() - pi.exp()))
    kl = float(-pi)     # where mu = 1
    for divergence, logs, d in [("tv", (pi, mu), tv), ("tv", (mu, pi), tv), ("kl", (pi, torch.zeros_like(pi)), kl)]:
        sign = 1 if logs[0] > logs[1] else -1
        assert tmax.dppo_loss(*logs, sign * advantage, divergence, d)[1]
        assert not tmax.dppo_loss(*logs, sign * advantage, divergence, math.nextafter(d, 0))[1]
        assert tmax.dppo_loss(*logs, -sign * advantage, divergence, 0.0)[1]     # towards the anchor it may always move


@pytest.mark.parametrize("loss", LOSSES)
def test_impossible_rollout_logprob_is_an_error(loss):
    """mu = 0 at a sampled token cannot be."""
    with pytest.raises(ValueError, match="-inf"):
        tmax.policy_loss(tmax.Config(loss=loss), torch.full((2,), -1.0), torch.tensor([-1.0, -math.inf]), torch.ones(2))


def test_overflowing_ratio_leaves_no_nan():
    """A masked token whose ratio overflows has gradient 0, not inf * 0."""
    logp = torch.tensor([-1.0], requires_grad=True)
    loss, kept = tmax.dppo_loss(logp, torch.tensor([-200.0]), torch.ones(1))
    loss.sum().backward()
    assert not kept and loss == 0 and logp.grad == 0


# ---------------------------------------------------------------------------------------------------------------------
# token_logprobs against a dense log_softmax
# ---------------------------------------------------------------------------------------------------------------------

class LargestTensor(TorchDispatchMode):
    """Within it, `numel` becomes the size of the largest tensor that any operator returns, in the backward pass too."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def head_inputs(n, dtype=torch.float64, width=16, vocab=97):
    """hidden, weight (both want gradients), targets."""
    g = torch.Generator().manual_seed(n)
    hidden, weight = ((torch.randn(rows, width, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()
                      for rows, scale in ((n, 1.0), (vocab, 4 * width ** -0.5)))
    return hidden, weight, torch.randint(0, vocab, (n,), generator=g)


def dense_logprobs(hidden, weight, targets, temperature=1.0):
    """The same from the full logits, in float64."""
    logp = torch.log_softmax(hidden.double() @ weight.double().T / temperature, -1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("n, chunk, temperature",
                         [(0, 8, 1.0), (1, 8, 1.0), (37, 8, 1.0), (37, 1, 0.7), (37, 37, 1.3), (37, 1000, 1.0)])
def test_token_logprobs_equal_dense(n, chunk, temperature):
    """Values, entropy and gradients in float64, for chunks that divide N and chunks that do not; entropy is detached."""
    hidden, weight, targets = head_inputs(n)
    logprobs, entropy = tmax.token_logprobs(hidden, weight, targets, chunk, temperature)
    wanted, wanted_entropy = dense_logprobs(hidden, weight, targets, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float64 and logprobs.shape == entropy.shape == (n,)
    assert not entropy.requires_grad
    torch.testing.assert_close(logprobs, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, wanted_entropy, rtol=0, atol=1e-12)
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for got, want in zip(*(torch.autograd.grad(x, (hidden, weight), upstream) for x in (logprobs, wanted))):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_head_is_fp32_over_bf16_weights():
    """bf16 inputs are multiplied and summed in FP32; with fp32=False the logits are rounded to bf16, as in a bf16 engine."""
    hidden, weight, targets = head_inputs(64, torch.bfloat16, width=256, vocab=500)
    wanted, wanted_entropy = dense_logprobs(hidden, weight, targets)
    logprobs, entropy = tmax.token_logprobs(hidden, weight, targets, 24)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert (logprobs - wanted).abs().max() < 1e-5 and (entropy - wanted_entropy).abs().max() < 1e-5
    rounded, _ = tmax.token_logprobs(hidden, weight, targets, 24, fp32=False)
    logits = (hidden @ weight.T).double()
    by_hand = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    assert (rounded - by_hand).abs().max() < 1e-5 and (rounded - wanted).abs().max() > 1e-2
    for got, want in zip(*(torch.autograd.grad(x.sum(), (hidden, weight)) for x in (logprobs, wanted))):
        assert got.dtype == torch.bfloat16 and (got - want).norm() < 0.01 * want.norm()


def test_full_logits_never_exist():
    """Forward and backward, no tensor is larger than [chunk, vocab]."""
    hidden, weight, targets = head_inputs(1000, torch.float32, width=8, vocab=5000)
    with LargestTensor() as largest:
        tmax.token_logprobs(hidden, weight, targets, chunk=20)[0].sum().backward()
    assert 0 < largest.numel <= 20 * 5000


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts of a small real model, and one step on them by hand
# ---------------------------------------------------------------------------------------------------------------------



def small_policy(seed=0, implementation="packed", **changes):
    """A Qwen3 whose distributions have peaks, so that the trust region is at work."""
    torch.manual_seed(seed)
    config = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=8, initializer_range=0.4, tie_word_embeddings=False, pad_token_id=PAD,
                  eos_token_id=EOS, bos_token_id=None)
    config = Qwen3Config(**config | changes)
    return tmax.Policy(AutoModelForCausalLM.from_config(config, attn_implementation=implementation), CFG)


def ordinary(lm):
    """A copy of the model with ordinary attention."""
    lm = copy.deepcopy(lm)
    lm.set_attn_implementation("sdpa")
    lm.zero_grad()
    return lm


def unpacked_logprobs(lm, r):
    """log pi of a rollout's sampled tokens: the model alone on that rollout, full logits, ordinary attention."""
    logp = torch.log_softmax(lm(torch.tensor([r.tokens])).logits[0, :-1], -1).gather(1, torch.tensor(r.tokens)[1:, None])[:, 0]
    return logp[torch.tensor(r.mask)[1:] == 1]


def random_rollout(draw, name="t", reward=0.0, versions=(0,)):
    """A prompt, then turns and observations; many sampled tokens are the pad token, and each turn ends with EOS."""
    r = tmax.Rollout(name, [], [], [], [], 0, reward=reward, finish="submitted")
    some = lambda low, high: [draw.choice([PAD, draw.randrange(2, VOCAB)]) for _ in range(draw.randint(low, high))]
    r.append(some(3, 9), 0)
    for turn in range(draw.randint(1, 4)):
        if turn:
            r.append(some(2, 8), 0)
        sampled = some(1, 12) + [EOS]
        r.append(sampled, 1, [0.0] * len(sampled), [versions[min(turn, len(versions) - 1)]] * len(sampled))
    return r


def sample_under(r, lms, draw=None):
    """Fill in r.logprobs: those of lms[version] for each token, with noise from `draw`."""
    with torch.no_grad():
        rows = [unpacked_logprobs(lm, r).tolist() for lm in lms]
    noise = (lambda: draw.gauss(0, 0.7)) if draw else (lambda: 0.0)
    for i, at in enumerate(i for i, m in enumerate(r.mask) if m):
        r.logprobs[at] = min(0.0, rows[r.versions[at]][i] + noise())


@dataclasses.dataclass
class Step:
    """What a step comes to: the gradient as one vector, and the loss."""
    gradient: torch.Tensor
    loss: float


def gradient_of(module):
    return torch.cat([p.grad.flatten().double() for p in module.parameters()])


def reference_step(lm, groups):
    """The recipe by hand: void rollouts out, A = R - mean, -sum(M r A) / tokens; each rollout alone, ordinary attention."""
    lm = ordinary(lm).double()
    loss, tokens, dropped = 0.0, 0, set()
    for group in groups:
        graded = [r for r in group if not r.finish.startswith("void")]
        mean = sum(r.reward for r in graded) / len(graded)
        for r in graded:
            logp = unpacked_logprobs(lm, r)
            logmu = torch.tensor([l for l, m in zip(r.logprobs, r.mask) if m], dtype=torch.float64)
            advantage = r.reward - mean
            away = logp > logmu if advantage > 0 else logp < logmu if advantage < 0 else torch.zeros_like(logp) > 0
            keep = ~(away & ((logp.exp() - logmu.exp()).abs() > 0.1))
            dropped |= {math.copysign(1, advantage)} if not keep.all() else set()
            loss = loss - ((logp - logmu).exp() * advantage * keep).sum()
            tokens += len(logp)
    (loss / tokens).backward()
    assert dropped == {-1.0, 1.0}       # the trust region holds some tokens back, of either sign
    return Step(gradient_of(lm), float(loss.detach() / tokens))


def prepared(groups, step=0):
    """As train() does it: select, compare. A flat list of rollouts with advantages."""
    kept, _ = tmax.select_groups(groups, step, CFG)
    for group in kept:
        for r, advantage in zip(group, tmax.centered_advantages([r.reward for r in group])):
            r.advantage = float(advantage)
    return sum(kept, [])


def take_step(policy, ranks, num_tokens=None):
    """Loss and gradient of the packs of simulated ranks; FSDP would average the gradients, so that is done here."""
    policy.zero_grad()
    num_tokens = num_tokens or sum(len(p.targets) for packs in ranks for p in packs)
    loss = 0.0
    for packs in ranks:
        loss += float(tmax.backward_packs(policy, packs, num_tokens, CFG, scale=len(ranks))["loss"].double().sum()) / num_tokens
    return Step(gradient_of(policy) / len(ranks), loss)


def check(step, reference):
    """The check of the whole step: gradient to 1e-5 by norm, loss to 1e-6."""
    assert (step.gradient - reference.gradient).norm() <= 1e-5 * reference.gradient.norm()
    assert abs(step.loss - reference.loss) <= 1e-6


@pytest.fixture(scope="module")
def policy():
    return small_policy()


@pytest.fixture(scope="module")
def batch(policy):
    """Six groups of four graded rollouts, two of them with one void rollout more; sampled some way off the policy."""
    draw = random.Random(0)
    lm = ordinary(policy.lm)
    groups = [[random_rollout(draw, f"task-{g}", reward) for reward in (0.0, 1.0, draw.random(), draw.random())] for g in range(6)]
    for group in groups[:2]:
        group.append(random_rollout(draw, group[0].task))
        group[-1].finish = "void:died"
    for r in sum(groups, []):
        sample_under(r, [lm], draw)
    return groups


@pytest.fixture
def groups(batch):
    return copy.deepcopy(batch)


@pytest.fixture
def rollouts(groups):
    return prepared(groups)


@pytest.fixture(scope="module")
def reference(policy, batch):
    return reference_step(policy.lm, batch)


# ---------------------------------------------------------------------------------------------------------------------
# Invariance: the step does not depend on how rollouts were packed and sharded
# ---------------------------------------------------------------------------------------------------------------------

def shuffled(rollouts):
    return random.Random(1).sample(rollouts, len(rollouts))


LAYOUTS = {
    "one per pack": lambda rs: [[tmax.build_pack([r]) for r in rs]],
    "all in one pack": lambda rs: [[tmax.build_pack(rs)]],
    "few packs": lambda rs: tmax.pack(rs, 200, 1),
    "another order": lambda rs: [[tmax.build_pack(shuffled(rs)[i::3]) for i in range(3)]],
    "1 rank": lambda rs: tmax.pack(rs, 70, 1),
    "2 ranks": lambda rs: tmax.pack(rs, 70, 2),
    "3 ranks": lambda rs: tmax.pack(shuffled(rs), 120, 3),
    "ranks without work": lambda rs: tmax.pack(rs, 1000, 5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_is_invariant(layout, policy, rollouts, reference):
    """24 rollouts in any packs on any ranks: the gradient and the loss of the equations."""
    assert len(rollouts) == 24
    check(take_step(policy, LAYOUTS[layout](rollouts)), reference)


def test_step_is_invariant_with_gradient_checkpointing(rollouts, reference):
    """Recomputing activations changes nothing: the borders of the segments reach the second forward pass."""
    policy = small_policy().train()
    policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    check(take_step(policy, tmax.pack(rollouts, 200, 2)), reference)


def test_defect_local_denominators(policy, rollouts, reference):
    """Put back: each pack divides by its own tokens, and packs and ranks are averaged."""
    packs = sum(tmax.pack(rollouts, 200, 2), [])
    steps = [take_step(policy, [[p]]) for p in packs]
    local = Step(sum(s.gradient for s in steps) / len(packs), sum(s.loss for s in steps) / len(packs))
    with pytest.raises(AssertionError):
        check(local, reference)


def test_defect_dropped_packs(policy, rollouts, reference):
    """Put back: packs that do not divide by the ranks are dropped."""
    packs, = tmax.pack(rollouts, 200, 1)
    ranks = 2 if len(packs) % 2 else 3
    assert len(packs) % ranks
    even = packs[:len(packs) // ranks * ranks]
    check(take_step(policy, [packs]), reference)
    with pytest.raises(AssertionError):
        check(take_step(policy, [even[i::ranks] for i in range(ranks)]), reference)


def test_defect_deleted_pad_tokens(policy, rollouts, reference):
    """Put back: sampled tokens equal to the pad token leave the training rows. Kept, each of them is a target."""
    count = lambda token: sum(m and t == token for r in rollouts for t, m in zip(r.tokens, r.mask))
    targets = np.concatenate([p.targets for packs in tmax.pack(rollouts, 200, 2) for p in packs]).tolist()
    assert targets.count(PAD) == count(PAD) > 100 and targets.count(EOS) == count(EOS) >= 24
    for r in rollouts:
        stays = [not (m and t == PAD) for t, m in zip(r.tokens, r.mask)]
        for name in ("tokens", "mask", "logprobs", "versions"):
            setattr(r, name, [x for x, s in zip(getattr(r, name), stays) if s])
    with pytest.raises(AssertionError):
        check(take_step(policy, tmax.pack(rollouts, 200, 2)), reference)


def test_defect_void_rewards_in_the_mean(policy, groups, reference):
    """Put back: an infrastructure failure enters its group as reward 0, in the mean alone or in the batch too."""
    for trained_too in (False, True):
        rollouts = []
        for group in groups:
            for r, advantage in zip(group, tmax.centered_advantages([r.reward for r in group])):
                r.advantage = float(advantage)
                rollouts += [r] if trained_too or not r.void else []
        with pytest.raises(AssertionError):
            check(take_step(policy, tmax.pack(rollouts, 200, 2)), reference)


def check_versions(group, policy, version):
    """The checks that rest on a token's version: nothing too old is trained on, and what the newest weights sampled has their
    logprobs. Returns the step's metrics."""
    kept, _ = tmax.select_groups([group], version, CFG)
    oldest = min(v for r in group for v in r.true_versions if v >= 0)
    assert bool(kept) == (version - oldest <= CFG.async_steps)
    seen = tmax.backward_packs(policy, [tmax.build_pack(group)], 1, CFG)
    metrics = tmax.step_metrics(seen, version)
    assert metrics["staleness_max"] == version - oldest
    assert metrics["mismatch_max"] < 1e-4 < metrics["drift_max"]
    return metrics


@pytest.mark.parametrize("versions, kept", [((1, 0), "old tokens within the bound"), ((5, 0), "a token beyond the bound")])
def test_defect_one_version_per_group(versions, kept, process_group):
    """Weights change within a rollout. Put back: the group is stamped once, when it comes back; then the stale one is trained
    on, and the old weights' logprobs count as a mismatch of the newest."""
    new, draw = max(versions), random.Random(2)
    lms = {v: small_policy(seed=v, implementation="sdpa").lm for v in versions}
    policy = small_policy(seed=new)
    group = [random_rollout(draw, reward=float(i % 2), versions=(0, new)) for i in range(4)]
    for r in group:
        r.true_versions = list(r.versions)
        sample_under(r, [lms.get(v, lms[new]) for v in range(new + 1)])
    check_versions(group, policy, new)
    for r in group:
        r.versions = [new if v >= 0 else v for v in r.versions]
    with pytest.raises(AssertionError):
        check_versions(group, policy, new)
    seen = tmax.backward_packs(policy, [tmax.build_pack(group)], 1, CFG)
    assert tmax.step_metrics(seen, new)["mismatch_max"] > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Packed attention: rollouts of a pack do not see each other
# ---------------------------------------------------------------------------------------------------------------------

def packed_logprobs(policy, rollouts):
    """Packed logprobs and entropies, one tensor of each per rollout."""
    with torch.no_grad():
        return [x.split([sum(r.mask) for r in rollouts]) for x in policy.run(tmax.build_pack(rollouts))]


def test_packed_logprobs_equal_unpacked(policy, rollouts):
    """To 1e-5 in FP32, entropy too."""
    lm = ordinary(policy.lm)
    for r, logprobs, entropy in zip(rollouts, *packed_logprobs(policy, rollouts)):
        assert (logprobs - unpacked_logprobs(lm, r)).abs().max() < 1e-5
        full = torch.log_softmax(lm(torch.tensor([r.tokens])).logits[0, :-1], -1)[torch.tensor(r.mask)[1:] == 1]
        assert (entropy + (full.exp() * full).sum(-1)).abs().max() < 1e-5


def test_temperature_divides_the_logits(policy, rollouts):
    """A policy that samples at 0.7 is trained at 0.7."""
    warm = tmax.Policy(policy.lm, tmax.Config(temperature=0.7))
    lm = ordinary(policy.lm)
    lm.lm_head.weight.data /= 0.7
    for r, logprobs in zip(rollouts, packed_logprobs(warm, rollouts)[0]):
        assert (logprobs - unpacked_logprobs(lm, r)).abs().max() < 1e-5


@pytest.mark.parametrize("changed", [0, 11, 23])
def test_rollouts_do_not_see_each_other(changed, policy, rollouts):
    """Other tokens in one rollout change no other rollout's logprobs, not in the last bit."""
    before, _ = packed_logprobs(policy, rollouts)
    rollouts[changed].tokens = [(t + 7) % VOCAB for t in rollouts[changed].tokens]
    after, _ = packed_logprobs(policy, rollouts)
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [i != changed for i in range(24)]


def test_attention_without_borders_is_an_error(policy):
    """A forward pass that forgot cu_seqlens fails, instead of letting rollouts see each other."""
    with pytest.raises(ValueError, match="cu_seqlens"):
        policy.lm(input_ids=torch.tensor([[2, 3, 4]]))
    with pytest.raises(ValueError, match="cu_seqlens"):
        tmax.packed_attention(None, *(torch.zeros(1, 2, 3, 8) for _ in range(3)), None)


def test_positions_restart(policy, rollouts):
    """The model is told positions that start at 0 in every rollout (rotary embeddings alone would hardly show it)."""
    seen = []
    look = lambda _, args, given: seen.append(given["position_ids"])
    hook = policy.lm.base_model.register_forward_pre_hook(look, with_kwargs=True)
    packed_logprobs(policy, rollouts)
    hook.remove()
    assert seen[0].tolist() == [[i for r in rollouts for i in range(len(r.tokens))]]


def test_no_square_mask(policy):
    """A pack of N tokens: forward and backward, no tensor comes near [N, N]."""
    draw = random.Random(3)
    pack = tmax.build_pack([random_rollout(draw) for _ in range(40)])
    n = len(pack.tokens)
    with LargestTensor() as largest:
        policy.run(pack)[0].sum().backward()
    assert 0 < largest.numel <= 64 * n < n * n / 8      # 64: the widest layer


# ---------------------------------------------------------------------------------------------------------------------
# Packs
# ---------------------------------------------------------------------------------------------------------------------

def numbered_rollouts(lengths, seed=0):
    """Rollouts whose tokens are all different; whole arrays, so that long ones are cheap."""
    draw, starts = np.random.default_rng(seed), np.cumsum([0, *lengths]).tolist()
    made = []
    for i, n in enumerate(lengths):
        mask = draw.integers(0, 2, n) * (np.arange(n) > 0)      # a prompt has a token at least
        made.append(tmax.Rollout(f"task-{i}", np.arange(starts[i], starts[i] + n), mask, -draw.random(n), np.where(mask, i, -1), 1,
                                 advantage=float(draw.random() - 0.5)))
    return made


def segments(pack):
    """A pack taken apart: for each segment its tokens, and (token, log mu, advantage, version) of those that are trained on."""
    for start, end in zip(pack.cu_seqlens, pack.cu_seqlens[1:]):
        assert pack.positions[start:end].tolist() == list(range(end - start))
        mine = (pack.predicts >= start) & (pack.predicts < end)
        assert (pack.predicts[mine] + 1 < end).all()
        assert (pack.tokens[pack.predicts[mine] + 1] == pack.targets[mine]).all()
        data = (pack.targets, pack.rollout_logprobs, pack.advantages, pack.versions)
        yield pack.tokens[start:end].tolist(), [x[mine].tolist() for x in data]


def first_fit_decreasing(lengths, capacity):
    """How many packs first-fit decreasing needs."""
    loads = []
    for n in sorted(lengths, reverse=True):
        at = next((i for i, load in enumerate(loads) if load + n <= capacity), None)
        if at is None:
            loads.append(n)
        else:
            loads[at] += n
    return len(loads)


def is_empty(pack):
    return len(pack.tokens) == 1 and len(pack.targets) == 0


@PROPERTY
@given(st.lists(st.integers(2, 300), max_size=40), st.integers(1, 8), st.integers(0, 200))
def test_pack_keeps_every_rollout(lengths, num_ranks, spare):
    """Any lengths on any ranks: every rollout once, whole and with all that belongs to its tokens; nothing else."""
    rollouts, pack_length = numbered_rollouts(lengths), max(lengths, default=1) + spare
    ranks = tmax.pack(rollouts, pack_length, num_ranks)
    assert len(ranks) == num_ranks and len({len(packs) for packs in ranks}) == 1
    packs = sum(ranks, [])
    assert all(len(p.tokens) <= pack_length and p.cu_seqlens[-1] == len(p.tokens) for p in packs)
    assert len(packs) == max(1, math.ceil(first_fit_decreasing(lengths, pack_length) / num_ranks)) * num_ranks
    found = {tuple(tokens): data for p in packs if not is_empty(p) for tokens, data in segments(p)}
    assert sum(len(p.cu_seqlens) - 1 for p in packs if not is_empty(p)) == len(found) == len(rollouts)
    for r in rollouts:
        targets, logprobs, advantages, versions = found[tuple(r.tokens.tolist())]
        sampled = np.flatnonzero(r.mask)
        assert targets == r.tokens[sampled].tolist() and versions == r.versions[sampled].tolist()
        assert logprobs == r.logprobs[sampled].astype(np.float32).tolist()
        assert advantages == [np.float32(r.advantage)] * len(sampled)


def test_too_long_rollout_is_named():
    """A rollout that fits in no pack is an error that says whose it is; one that just fits is packed."""
    with pytest.raises(ValueError, match="task-1 .*101"):
        tmax.pack(numbered_rollouts([5, 101, 7]), 100, 2)
    tmax.pack(numbered_rollouts([5, 100, 7]), 100, 2)


def test_empty_pack_adds_exactly_nothing():
    """A rank without work: every parameter gets a gradient, for the collectives, and it is 0; so are loss and tokens."""
    ranks = tmax.pack(numbered_rollouts([9]), 100, 3)
    empty = [p for packs in ranks for p in packs if len(p.targets) == 0]
    assert len(empty) == 2
    policy = small_policy()
    seen = tmax.backward_packs(policy, empty, 1000, CFG, scale=3)
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())
    assert all(len(x) == 0 for x in seen.values())


def most_loaded(ranks):
    """The work of the most loaded rank, in units of the mean, from the FLOPs of Qwen3-8B: matrix products and attention."""
    flops = lambda n: 2 * 8e9 * n + 2 * 36 * 4096 * n * n
    work = [sum(float(flops(np.diff(p.cu_seqlens).astype(float)).sum()) for p in packs) for packs in ranks]
    return max(work) * len(work) / sum(work)


@pytest.mark.parametrize("seed", range(5))
def test_real_batches_are_balanced(seed):
    """256 of the real lengths on 4 ranks: few packs, and no rank more than 3 % above the mean work."""
    lengths = [min(n, 34_816) for n in random.Random(seed).choices(REAL_LENGTHS, k=256)]
    ranks = tmax.pack(numbered_rollouts(lengths), 34_816, 4)
    assert 4 * len(ranks[0]) <= math.ceil(first_fit_decreasing(lengths, 34_816) / 4) * 4
    assert sum(len(p.tokens) for packs in ranks for p in packs) == sum(lengths)
    assert most_loaded(ranks) < 1.03


def test_balance_counts_attention():
    """One long rollout and many short ones, as many tokens as fit in two packs: the long one's attention has its weight."""
    assert most_loaded(tmax.pack(numbered_rollouts([20_000] + [500] * 60), 34_816, 2)) < 1.03


# ---------------------------------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------------------------------

outcomes = st.builds(
    lambda reward, finish, versions: tmax.Rollout("t", [5] * len(versions), [int(v >= 0) for v in versions], [0.0] * len(versions),
                                                  versions, 1, reward=reward, finish=finish),
    st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(["submitted", "submitted", "no_call", "max_tokens", "void:died"]),
    st.lists(st.sampled_from([-1, 4, 5, 6, 7, 8, 9, 10]), min_size=1, max_size=4))


@PROPERTY
@given(st.lists(st.lists(outcomes, min_size=1, max_size=5), max_size=8), st.integers(0, 6))
def test_select_groups(groups, async_steps):
    """Any mix of outcomes at version 10: what is kept can be trained on, what is not is counted once, by its reason."""
    kept, counts = tmax.select_groups(groups, 10, tmax.Config(async_steps=async_steps))
    wanted, expected = [], dict(groups_kept=0, groups_void=0, groups_stale=0, groups_zero_spread=0, rollouts_void=0)
    for group in groups:
        graded = [r for r in group if r.finish != "void:died"]
        ages = [10 - v for r in graded for v in r.versions if v != -1]
        expected["rollouts_void"] += len(group) - len(graded)
        if len(graded) < 2:
            expected["groups_void"] += 1
        elif any(age > async_steps for age in ages):
            expected["groups_stale"] += 1
        elif max(r.reward for r in graded) == min(r.reward for r in graded):
            expected["groups_zero_spread"] += 1
        else:
            expected["groups_kept"] += 1
            wanted.append(graded)
    assert counts == expected
    assert [[id(r) for r in group] for group in kept] == [[id(r) for r in group] for group in wanted]


@PROPERTY
@given(st.lists(st.floats(0, 1), min_size=1, max_size=32))
def test_centered_advantages(rewards):
    """Reward minus mean, in float64, with no division by the deviation."""
    advantages = tmax.centered_advantages(rewards)
    assert isinstance(advantages, np.ndarray) and advantages.dtype == np.float64
    mean = math.fsum(rewards) / len(rewards)
    assert advantages.tolist() == pytest.approx([r - mean for r in rewards], abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics over the whole step
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def process_group():
    """A world of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def simulated_ranks(monkeypatch, function, shares):
    """[function(share), …], each on a thread of its own; their all_reduce meets in the middle."""
    met, placed, results = threading.Barrier(len(shares), timeout=60), {}, {}

    def all_reduce(tensor, op=dist.ReduceOp.SUM):
        placed[threading.current_thread().name] = tensor.clone()
        met.wait()
        every = torch.stack(list(placed.values()))
        met.wait()
        tensor.copy_(every.sum(0) if op == dist.ReduceOp.SUM else every.amax(0))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    work = lambda i: results.update({i: function(shares[i])})
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(shares))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return [results[i] for i in range(len(shares))]


def metrics_by_hand(seen, version):
    """step_metrics from plain lists, one token after the other."""
    tokens = [SimpleNamespace(**dict(zip(seen, values))) for values in zip(*(seen[k].double().tolist() for k in seen))]
    mean = lambda values: sum(values) / len(values) if values else None
    gap = lambda t: abs(t.logprobs - t.rollout_logprobs)
    moved = [abs(math.exp(t.logprobs) - math.exp(t.rollout_logprobs)) for t in tokens]
    return dict(
        tokens=len(tokens), loss=mean([t.loss for t in tokens]), entropy=mean([t.entropy for t in tokens]),
        kept_fraction=mean([t.kept for t in tokens]), kept_fraction_positive=mean([t.kept for t in tokens if t.advantages > 0]),
        kept_fraction_negative=mean([t.kept for t in tokens if t.advantages < 0]),
        mismatch_max=max((gap(t) for t in tokens if t.versions == version), default=None), drift_max=max(gap(t) for t in tokens),
        divergence_mean=mean(moved), divergence_max=max(moved),
        ratio_max=max(math.exp(t.logprobs - t.rollout_logprobs) for t in tokens),
        staleness_mean=mean([version - t.versions for t in tokens]), staleness_max=max(version - t.versions for t in tokens))


def some_figures(policy, rollouts):
    """Figures of two packs of rollouts with the versions 3 to 5."""
    for i, r in enumerate(rollouts):
        r.versions = [3 + (i + j + 1) % 3 if m else -1 for j, m in enumerate(r.mask)]
    return [tmax.backward_packs(policy, [tmax.build_pack(part)], 100, CFG) for part in (rollouts[:10], rollouts[10:])]


def test_metrics_are_of_the_whole_step(policy, rollouts, process_group):
    """Two packs: every figure as counted by hand, over both; the figures themselves are the rollouts' own."""
    first, second = some_figures(policy, rollouts)
    both = tmax.backward_packs(policy, [tmax.build_pack(part) for part in (rollouts[:10], rollouts[10:])], 100, CFG)
    assert all(torch.equal(both[k], torch.cat([first[k], second[k]])) for k in both)
    for name in ("logprobs", "versions"):
        own = [x for r in rollouts for x, m in zip(getattr(r, name), r.mask) if m]
        assert both["rollout_logprobs" if name == "logprobs" else name].tolist() == pytest.approx(own)
    metrics = tmax.step_metrics(both, 5)
    assert metrics == pytest.approx(metrics_by_hand(both, 5), rel=1e-6)
    assert metrics["mismatch_max"] != metrics["drift_max"] and 0 < metrics["kept_fraction_negative"] < 1
    assert metrics["kept_fraction_positive"] != metrics["kept_fraction_negative"] != metrics["kept_fraction"]


def test_metrics_are_of_all_ranks(policy, rollouts, monkeypatch):
    """Two ranks with a pack each, and one without work: every rank reports the same, as counted by hand over all of them."""
    first, second = some_figures(policy, rollouts)
    nothing = tmax.backward_packs(policy, [tmax.build_pack([])], 100, CFG)
    both = {k: torch.cat([first[k], second[k]]) for k in first}
    for metrics in simulated_ranks(monkeypatch, lambda seen: tmax.step_metrics(seen, 5), [first, second, nothing]):
        assert metrics == pytest.approx(metrics_by_hand(both, 5), rel=1e-6)


def test_metrics_that_are_no_numbers_are_null(policy, rollouts, process_group):
    """What metrics.jsonl holds must be JSON, also of a step that is skipped."""
    seen = some_figures(policy, rollouts)[0]
    for name in ("loss", "logprobs", "entropy"):
        seen[name][3] = math.nan
    metrics = tmax.step_metrics(seen, 5)
    assert json.dumps(metrics, allow_nan=False) and metrics["loss"] is metrics["drift_max"] is None and metrics["kept_fraction"] > 0


def test_metrics_without_the_newest_version(policy, rollouts, process_group):
    """No token of the newest weights, no advantage above 0: null, not 0."""
    for r in rollouts:
        r.advantage = -1.0
    seen = tmax.backward_packs(policy, [tmax.build_pack(rollouts)], 100, CFG)
    metrics = tmax.step_metrics(seen, 4)
    assert metrics["mismatch_max"] is None and metrics["kept_fraction_positive"] is None and metrics["staleness_max"] == 4
    assert metrics["drift_max"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
def test_gpu_attention_equals_cpu():
    """Variable-length attention in bf16 against exact attention per segment, with the heads of Qwen3-8B, backward too."""
    lengths = [1, 17, 300, 64, 2, 513]
    borders, g = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), torch.Generator().manual_seed(0)
    some = lambda *shape: torch.randn(1, *shape, 128, generator=g).bfloat16()
    inputs, upstream = [some(heads, sum(lengths)) for heads in (32, 8, 8)], some(sum(lengths), 32)

    def run(device, dtype):
        qkv = [x.to(device, dtype).requires_grad_() for x in inputs]
        out, _ = tmax.packed_attention(None, *qkv, None, scaling=128 ** -0.5, cu_seqlens=borders.to(device))
        return [x.float().cpu() for x in (out.detach(), *torch.autograd.grad(out, qkv, upstream.to(device, dtype)))]
    for got, want in zip(run("cuda", torch.bfloat16), run("cpu", torch.float32)):
        assert got.shape == want.shape and (got - want).norm() < 0.01 * want.norm()
        for a, b in zip(*(x.split(lengths, 1 if x.shape[2] == 32 else 2) for x in (got, want))):    # in the short ones as well
            assert (a - b).norm() < 0.02 * b.norm() + 1e-3


@pytest.mark.gpu
@needs_gpu
def test_gpu_logprobs_memory():
    """A full pack of Qwen3-8B: at most 2.5 GiB beyond inputs, weight and their gradients; and the values are right."""
    n, vocab, width = 34_816, 151_936, 4096
    hidden, weight = (torch.randn(rows, width, device="cuda", dtype=torch.bfloat16).mul_(scale).requires_grad_()
                      for rows, scale in ((n, 1.0), (vocab, 0.02)))
    targets = torch.randint(0, vocab, (n,), device="cuda")
    tmax.token_logprobs(hidden[:8], weight, targets[:8])[0].sum().backward()      # workspaces of the libraries
    hidden.grad = weight.grad = None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logprobs, _ = tmax.token_logprobs(hidden, weight, targets)
    logprobs.mean().backward()
    extra = torch.cuda.max_memory_allocated() - before - 2 * width * (n + vocab)
    print(f"\ntoken_logprobs {n} x {vocab} x {width} bf16: {extra / 2**30:.2f} GiB beyond inputs, weight and gradients")
    assert extra <= 2.5 * 2**30
    rows = torch.arange(0, n, n // 7, device="cuda")
    wanted, _ = dense_logprobs(hidden[rows].detach().cpu(), weight.detach().cpu(), targets[rows].cpu())
    assert (logprobs[rows].detach().cpu() - wanted).abs().max() < 1e-3


QWEN3_8B = dict(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128, intermediate_size=12288,
                vocab_size=151936, tie_word_embeddings=False)


def without_weights(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.gpu
@pytest.mark.bench
@needs_gpu
@pytest.mark.parametrize("count", [1, 4, 16])
def test_gpu_benchmark_update(request, monkeypatch, capsys, count, peak=989e12):
    """One update at the shapes of Qwen3-8B, as many layers as one GPU holds: a full pack of `count` rollouts, 71 % sampled.

    MFU = (6 N P + 6 M V d + 6 L q sum n^2) / (seconds * peak): N tokens through P layer parameters, M sampled ones through
    the head, causal attention of L layers with q = heads * head_dim over segments of n. Recomputed activations do not count."""
    if "bench" not in request.config.option.markexpr:
        pytest.skip("runs with -m bench")
    cfg, free = tmax.Config(), torch.cuda.mem_get_info()[0]
    shaped = lambda layers: Qwen3Config(num_hidden_layers=layers, **QWEN3_8B)
    layers = max(k for k in range(1, 37) if sum(tmax.learner_memory(without_weights(shaped(k)), cfg, 1)[1].values()) < 0.95 * free)
    make = AutoModelForCausalLM.from_config

    def random_model(_, **kw):
        with torch.device("cuda"):
            return make(shaped(layers), **kw)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", random_model)
    cell = tmax.join_ranks()
    try:
        learner, n = tmax.Learner(cfg, "random", cell), cfg.pack_length // count
        mask = [int(i > 900 and i % 100 < 73) for i in range(n)]
        rollouts = [tmax.Rollout("t", [7] * n, mask, [-12.0] * n, [0] * n, 1, advantage=i - 0.5) for i in range(count)]
        packs = [tmax.build_pack(rollouts)]

        def seconds(repeats):
            torch.cuda.synchronize()
            start = time.monotonic()
            for _ in range(repeats):
                learner.update(packs)
            torch.cuda.synchronize()
            return (time.monotonic() - start) / repeats
        seconds(2)
        took = seconds(3)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            seconds(1)
    finally:
        dist.destroy_process_group()
    sampled, inside = count * sum(mask), sum(p.numel() for p in learner.policy.lm.base_model.layers.parameters())
    flops = 6 * count * n * inside + 6 * sampled * 151936 * 4096 + 6 * layers * 4096 * count * n * n
    with capsys.disabled():
        print(f"\n{layers} layers, {count} rollouts of {n} tokens on {torch.cuda.get_device_name()}: {took:.2f} s an update with "
              f"the optimizer's step, {count * n / took:.0f} tokens/s, MFU {flops / took / peak:.1%} of {peak / 1e12:g} TFLOP/s")
        print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=12, max_name_column_width=60))


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark: python -m pytest -m bench -s. It prints; it asserts nothing about time.
# ---------------------------------------------------------------------------------------------------------------------

BENCH_VOCAB, BENCH_SHRINK, BENCH_ROWS = 151_936, 128, 8     # vocabulary, factor on the real lengths, full rollouts in a micro-batch


@contextlib.contextmanager
def measured(figures):
    """Seconds, and the peak of resident memory beyond what was there before, into `figures`."""
    status = lambda name: int(re.search(rf"{name}:\s+(\d+) kB", open("/proc/self/status").read())[1]) / 2**20
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                         # start the high-water mark anew
    before, start = status("VmRSS"), time.monotonic()
    yield
    figures.update(seconds=time.monotonic() - start, gib=status("VmHWM") - before)


def bench_policy(implementation):
    return small_policy(implementation=implementation, vocab_size=BENCH_VOCAB, hidden_size=96, intermediate_size=256,
                        num_hidden_layers=4, initializer_range=0.02)


def bench_rollouts(count=24):
    """Real lengths scaled down; of the tokens after the prompt 71 % are sampled."""
    draw, made = random.Random(0), []
    for n in draw.choices(REAL_LENGTHS, k=count):
        n = min(n, 34_816) // BENCH_SHRINK
        mask = [int(i > 7 and i % 100 < 73) for i in range(n)]
        tokens = [draw.randrange(BENCH_VOCAB) for _ in range(n)]
        made.append(tmax.Rollout("t", tokens, mask, [-12.0 * m for m in mask], [m - 1 for m in mask], 8))
        made[-1].advantage = draw.random() - 0.5
    return made


def bench_packed():
    """Packed rows, the head at sampled positions alone, in chunks."""
    policy, rollouts, figures = bench_policy("packed"), bench_rollouts(), {}
    packs, = tmax.pack(rollouts, BENCH_ROWS * 34_816 // BENCH_SHRINK, 1)
    with measured(figures):
        seen = tmax.backward_packs(policy, packs, sum(len(p.targets) for p in packs), CFG)
    return figures | dict(loss=float(seen["loss"].mean()), gradient=float(gradient_of(policy).norm()), batches=len(packs))


def bench_usual():
    """Right-padded micro-batches with a mask, full logits, log_softmax over all of them; the same loss."""
    policy, rollouts, figures, total = bench_policy("sdpa"), bench_rollouts(), {}, 0.0
    count = sum(sum(r.mask) for r in rollouts)
    with measured(figures):
        for i in range(0, len(rollouts), BENCH_ROWS):
            part = rollouts[i:i + BENCH_ROWS]
            pad = lambda rows: torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
            tokens, mask = pad([r.tokens for r in part]), pad([r.mask for r in part]).bool()
            there = pad([[1] * len(r.tokens) for r in part])
            logits = policy.lm(input_ids=tokens, attention_mask=there, use_cache=False).logits[:, :-1]
            logp = torch.log_softmax(logits, -1).gather(2, tokens[:, 1:, None])[..., 0][mask[:, 1:]]
            del logits
            logmu = pad([r.logprobs for r in part])[:, 1:][mask[:, 1:]]
            advantage = torch.tensor([r.advantage for r in part])[:, None].expand_as(mask)[:, 1:][mask[:, 1:]]
            loss = tmax.policy_loss(CFG, logp, logmu, advantage)[0].sum() / count
            loss.backward()
            total += float(loss)
    return figures | dict(loss=total, gradient=float(gradient_of(policy).norm()), batches=math.ceil(len(rollouts) / BENCH_ROWS))


def bench_head(dense, n=4096, width=96):
    """Forward and backward of the head alone."""
    hidden, weight, targets = head_inputs(n, torch.float32, width, BENCH_VOCAB)
    figures = {}
    with measured(figures):
        if dense:
            torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None]).mean().backward()
        else:
            tmax.token_logprobs(hidden, weight, targets)[0].mean().backward()
    figures["gib"] -= 4 * width * (n + BENCH_VOCAB) / 2**30     # gradients
    return figures


def in_fresh_process(function, *args):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@pytest.mark.bench
def test_benchmark(request, capsys):
    """Packed, chunked and mask-only against a padded batch with full logits: tokens/s and peak memory, side by side."""
    if "bench" not in request.config.option.markexpr:
        pytest.skip("runs with -m bench")
    rollouts = bench_rollouts()
    tokens, sampled = sum(len(r.tokens) for r in rollouts), sum(sum(r.mask) for r in rollouts)
    size = sum(p.numel() for p in bench_policy("packed").parameters())
    rows = {"padded, full logits": in_fresh_process(bench_usual), "packed, chunked, mask only": in_fresh_process(bench_packed)}
    heads = {"dense log_softmax": in_fresh_process(bench_head, True), "token_logprobs": in_fresh_process(bench_head, False)}
    with capsys.disabled():
        print(f"\n\none step of a Qwen3 with {size / 1e6:.1f}M parameters, vocabulary {BENCH_VOCAB}, "
              f"{torch.get_num_threads()} threads: {len(rollouts)}\n"
              f"rollouts of real lengths / {BENCH_SHRINK}, {tokens} tokens, {sampled} of them sampled")
        for name, f in rows.items():
            print(f"  {name:28}{tokens / f['seconds']:8.0f} tokens/s {f['gib']:7.2f} GiB peak   {f['batches']} batches   "
                  f"loss {f['loss']:.6f}   gradient norm {f['gradient']:.6f}")
        print(f"the head alone, forward and backward, 4096 x {BENCH_VOCAB}, FP32: peak beyond inputs, weight and gradients")
        for name, f in heads.items():
            print(f"  {name:28}{f['gib']:8.2f} GiB {f['seconds']:7.1f} s")


FIELDS = {field.name: field.default for field in dataclasses.fields(tmax.Config)}
CFG = tmax.Config(sandbox="bwrap", bash_timeout=100.0)
MARKER = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
SUBMIT = f"echo {MARKER}"


def make_task(folder, test="echo 1 >/logs/verifier/reward.txt", instruction="Do it.", toml=None, seeds=None, files=None):
    """Write a Harbor task folder; None leaves a file out."""
    (folder / "tests").mkdir(parents=True)
    content = {"tests/test.sh": test, "instruction.md": instruction, "task.toml": toml} | (files or {})
    for name, content in {**content, **{f"environment/seeds/{name}": text for name, text in (seeds or {}).items()}}.items():
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Config and command line
# ---------------------------------------------------------------------------------------------------------------------

def test_defaults_are_the_cards_values():
    """Each row of the model card is a field of Config."""
    card = dict(model="allenai/tmax-sft-8b", tasks=["allenai/tmax-15k-open-instruct"], max_prompt_tokens=2048,
                max_turn_tokens=16384, max_total_tokens=32768, pack_length=34816, packs_per_device=1, prompts_per_step=32,
                samples_per_prompt=8, async_steps=4, max_steps=64, learning_rate=1e-6, warmup_steps=0, training_steps=500,
                temperature=1.0, kl_beta=0.0, loss="dppo_tv", dppo_threshold=0.1, advantage="centered", fp32_lm_head=True,
                max_grad_norm=1.0, gradient_checkpointing=True, dtype="bfloat16", bash_timeout=120.0)
    cfg = tmax.parse_config([])
    assert {name: getattr(cfg, name) for name in card} == card
    assert cfg == tmax.Config()


@pytest.mark.parametrize("argv, named", [
    ("--lerning_rate 1", "--lerning_rate"), ("--learning 1", "--learning"), ("stray", "stray"),
    ("--pack_length 0", "pack_length"), ("--pack_length 34815", "34816"),
    ("--tasks", "--tasks"), ("--samples_per_prompt 1", "samples_per_prompt"), ("--packs_per_device 2", "packs_per_device"),
    ("--loss foo", "--loss"), ("--advantage std", "--advantage"), ("--dtype int8", "--dtype"), ("--sandbox chroot", "--sandbox"),
    ("--kl_beta 0.1", "kl_beta"), ("--kl_beta nan", "kl_beta"), ("--oracle", "--eval"), ("--training_steps 1.5", "training_steps"),
    ("--training_steps many", "training_steps"), ("--fp32_lm_head perhaps", "fp32_lm_head"), ("--name a/b", "name"),
    (f"--name {'a' * 300}", "name"), ("--seed 9223372036854775808", "seed"), ("--tiny --plan", "plan"),
    *((f"--{name} {value}", name) for name in ("learning_rate", "temperature", "dppo_threshold", "max_grad_norm", "bash_timeout")
      for value in ("nan", "inf", "0", "-1")),
    *((f"--{name} -1", name) for name in ("max_prompt_tokens", "max_turn_tokens", "max_total_tokens", "max_steps", "async_steps",
                                          "warmup_steps", "prompts_per_step", "training_steps", "num_learners", "num_engines",
                                          "max_concurrent_rollouts", "save_every", "eval_runs", "gpu_memory_gb", "seed")),
])
def test_wrong_values_are_refused_by_name(argv, named):
    """A wrong flag or value raises UserError with one line that names it."""
    with pytest.raises(tmax.UserError, match=re.escape(named)) as error:
        tmax.parse_config(argv.split())
    assert "\n" not in str(error.value)


def test_tiny_is_a_preset_and_given_flags_win():
    """--tiny sets fields of Config and nothing else; a flag beside it wins, before or after it."""
    assert set(tmax.TINY) <= set(FIELDS)
    tiny = tmax.Config(**tmax.TINY)
    for argv in (["--tiny"], ["--tiny", "true"], ["--tiny=True"]):
        assert tmax.parse_config(argv) == tiny
    wanted = dataclasses.replace(tiny, max_steps=3, loss="grpo", dtype="bfloat16", gradient_checkpointing=True)
    flags = ["--max_steps", "3", "--loss", "grpo", "--dtype=bfloat16", "--gradient_checkpointing", "true"]
    for place in (0, 2, 5, 7):
        assert tmax.parse_config([*flags[:place], "--tiny", *flags[place:]]) == wanted
    assert tmax.parse_config(["--tiny", "false"]) == tmax.Config()
    assert tmax.parse_config("--async_steps 0 --seed 0 --warmup_steps 0 --fp32_lm_head false".split()).async_steps == 0


@pytest.mark.parametrize("gpus, ranks, world, flags, split", [
    (0, 0, 1, "--tiny", (1, 1)), (0, 0, 1, "--tiny --num_learners 2 --num_engines 3", (2, 3)), (8, 0, 1, "", (4, 4)),
    (2, 0, 1, "", (1, 1)), (8, 0, 1, "--num_learners 2", (2, 6)), (8, 0, 1, "--num_engines 3", (4, 3)), (8, 6, 12, "", (6, 2)),
    (1, 0, 1, "--tiny", (1, 1)), (0, 2, 4, "--tiny", (2, 1)), (1, 0, 1, "", "has 1;"), (0, 0, 1, "", "needs GPUs"),
    (8, 0, 1, "--num_learners 5 --num_engines 4", "make 9 GPUs"), (8, 4, 4, "--num_learners 2", "torchrun started 4"),
    (8, 4, 12, "", "32 groups are no equal shares for 3 nodes")])
def test_split_of_a_node(monkeypatch, gpus, ranks, world, flags, split):
    """Learners and engines by default and by flag, alone and under torchrun; or why not."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in dict(LOCAL_WORLD_SIZE=ranks, WORLD_SIZE=world).items() if ranks else ():
        monkeypatch.setenv(name, str(value))
    if isinstance(split, str):
        with pytest.raises(tmax.UserError, match=split):
            tmax.resolve(tmax.parse_config(flags.split()))
    else:
        cfg = tmax.resolve(tmax.parse_config(flags.split()))
        assert (cfg.num_learners, cfg.num_engines) == split and cfg.name


@pytest.mark.parametrize("visible, devices",
                         [(None, "4,5,6,7"), ("7,6,5,4,3,2,1,0", "3,2,1,0"), ("0,1,2,3,9", "9"), ("5", "5")])
def test_engines_get_the_other_gpus(monkeypatch, visible, devices):
    """The GPUs after the learners' four; the only one, if it must be shared."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert tmax.engine_devices(tmax.Config(num_learners=4, num_engines=4)) == devices


def test_rollouts_at_once():
    """What the KV cache holds at the mean length, more for those in bash, within what the asynchrony allows; or as told."""
    cfg = tmax.Config()
    assert tmax.concurrency(cfg, 4 * 380_000) == math.ceil(4 * 380_000 / (0.76 * 34_816) / 0.6) == 96
    assert tmax.concurrency(cfg, 10 ** 12) == 5 * 32 * 8
    assert tmax.concurrency(dataclasses.replace(cfg, max_concurrent_rollouts=7), 10 ** 12) == 7


def test_help_names_every_field(monkeypatch, capsys):
    """--help explains all fields and exits with 0, also if an explanation holds a percent sign."""
    @dataclasses.dataclass
    class More(tmax.Config):
        share: float = tmax.knob(1.0, "100 % of it, 5%s")
    monkeypatch.setattr(tmax, "Config", More)
    with pytest.raises(SystemExit) as end:
        tmax.parse_config(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "100 % of it, 5%s" in said
    assert all(f"--{name}" in said for name in FIELDS)


def test_run_folder_is_new(tmp_path, monkeypatch):
    """Logs of images may be there before it; a run may not. What cannot be made is one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a/images").mkdir(parents=True)
    assert json.loads((tmax.make_run_dir(tmax.Config(name="a")) / "config.json").read_text())["name"] == "a"
    (tmp_path / "runs/file").write_text("")
    for name in ("a", "file"):
        with pytest.raises(tmax.UserError, match=f"--name: runs/{name}"):
            tmax.make_run_dir(tmax.Config(name=name))


def test_errors_are_one_line(tmp_path):
    """`python tmax.py` with something the user can mend: exit code 1, one line on stderr, no traceback, no run folder."""
    make_task(tmp_path / "untested/a", test=None)
    make_task(tmp_path / "good/a")
    AutoConfig.for_model("qwen3_5").save_pretrained(tmp_path / "hybrid")
    table = [("--lerning_rate 1", ["--lerning_rate"]), ("", ["GPU", "--tiny"]), ("--tiny --tasks untested", ["tests/test.sh", "untested"]),
             ("--tiny --tasks /nowhere", ["--tasks", "/nowhere"]), ("--tiny --model hybrid", ["--model", "linear_attention"]),
             ("--tiny --eval --model /nowhere --tasks good", ["--model", "/nowhere"])]
    started = [subprocess.Popen([sys.executable, tmax.__file__, *argv.split()], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}) for argv, _ in table]
    for process, (argv, wanted) in zip(started, table):
        said = process.communicate()[1]
        assert process.returncode == 1 and re.fullmatch(r"error: [^\n]+\n", said) and all(word in said for word in wanted), said
    assert not (tmp_path / "runs").exists()


def test_run_sh_says_what_is_missing(tmp_path):
    """No Python, no room: one line each, and no .venv is begun."""
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(Path(tmax.__file__).parent / name, tmp_path)
    (programs := tmp_path / "bin").mkdir()
    for name in "bash sh sed cat grep dirname awk rm flock tr".split():
        (programs / name).symlink_to(shutil.which(name))
    (programs / "df").write_text("#!/bin/sh\necho; echo a b c 1000\n")
    (programs / "df").chmod(0o755)
    for python, said in [({}, "error: no Python"), (dict(PYTHON="/no/python"), "error: no Python"),
                         (dict(PYTHON=sys.executable), "error: not enough disk space")]:
        ran = subprocess.run(["bash", tmp_path / "run.sh", "setup"], env={"PATH": str(programs), **python}, capture_output=True, text=True)
        assert ran.returncode == 1 and ran.stderr.startswith(said) and ran.stderr.count("\n") == 1 and not (tmp_path / ".venv").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------------

DOCKER = dataclasses.replace(CFG, sandbox="docker", image="any")
FULL = """version = "1.0"
[metadata]\ndifficulty = "easy"
[agent]\ntimeout_sec = 7\nuser = 1000
[verifier]\ntimeout_sec = 8.5\nuser = "root"\nenvironment_mode = "shared"
[verifier.env]\nKEY = "a b"\nN = 3
[solution.env]
[environment]\nbuild_timeout_sec = 9\ndocker_image = "image:1"\nos = "linux"\ncpus = 2\nmemory_mb = 99\nstorage_mb = 5\ngpus = 0
network_mode = "no-network"\nmcp_servers = []\nunknown = 1
[environment.env]\n"""
ALL = dict(instruction="Grüße", image="image:1", agent_timeout=7.0, verifier_timeout=8.5, verifier_env=(("KEY", "a b"), ("N", "3")),
           memory_mb=99, cpus=2.0, network="no-network", user="1000", build_timeout=9.0)
# What a task folder holds (keywords of make_task) -> the fields that differ from a Task's defaults, or the reason against it.
ZOO = [
    (dict(), {}), (dict(toml=""), {}), (dict(toml='version = "1.0"'), {}), (dict(toml='schema_version = "1.4"'), {}),
    (dict(instruction="\n Grüße \n", toml=FULL), ALL),
    (dict(toml='[environment]\nmemory = "3G"'), dict(memory_mb=3072)), (dict(toml='[environment]\nmemory = "512m"'), dict(memory_mb=512)),
    (dict(toml="[environment]\nmemory_mb = 0.5"), dict(memory_mb=1)), (dict(toml="[environment]\ncpus = 0.5"), dict(cpus=0.5)),
    (dict(toml="[environment]\nallow_internet = true"), {}), (dict(toml='[environment]\nnetwork_mode = "public"'), {}),
    (dict(toml="[environment]\nallow_internet = false"), dict(network="no-network")),
    (dict(toml='[environment]\nallow_internet = false\n[agent]\nnetwork_mode = "no-network"'), dict(network="no-network")),
    (dict(toml='[environment]\nworkdir = "/app"'), {}), (dict(seeds={"a": "x"}), {}),
    (dict(files={"image.txt": "image:2\n"}), dict(image="image:2")), (dict(files={"environment/Dockerfile": "FROM x"}), {}),
    (dict(files={"image.txt": "image:2"}, toml='[environment]\ndocker_image = "image:3"'), dict(image="image:3")),
    (dict(test=None), "no tests/test.sh"), (dict(instruction=None), "no instruction.md"), (dict(instruction=" \n"), "empty"),
    (dict(instruction=b"caf\xe9"), "utf-8"), (dict(toml=b"\xff = 1"), "utf-8"), (dict(toml="[agent\n"), "line 1"),
    (dict(toml=f"a = {'[' * 9000}"), "recursion"), (dict(toml='agent = "soon"'), "tables"), (dict(toml="[verifier]\nenv = 3"), "tables"), (dict(toml="verifier = 1"), "tables"),
    (dict(toml='[agent]\ntimeout_sec = "soon"'), "timeout_sec = 'soon' is not"), (dict(toml="[agent]\ntimeout_sec = [1]"), "[1] is not"),
    (dict(toml="[agent]\ntimeout_sec = 0"), "timeout_sec = 0 is not a positive number"), (dict(toml="[verifier]\ntimeout_sec = nan"), "nan is not"),
    (dict(toml="[environment]\nmemory_mb = inf"), "inf is not"), (dict(toml="[environment]\ncpus = -1"), "-1 is not"),
    (dict(toml="[environment]\nbuild_timeout_sec = true"), "True is not"), (dict(toml='[environment]\nmemory = "5X"'), "memory = '5X' is not"),
    (dict(toml='version = "2.0"'), "schema version 2.0"), (dict(toml='[[steps]]\nname = "a"', instruction=None), "several steps"),
    (dict(files={"environment/docker-compose.yaml": "services: {}"}), "compose"),
    (dict(files={"environment/docker-compose.yml": "services: {}"}), "compose"),
    (dict(toml="[environment]\ngpus = 1"), "gpus but for none"), (dict(toml='[environment.tpu]\ntype = "v6e"'), "tpu"),
    (dict(toml='[environment]\nos = "windows"'), "os but for linux"),
    (dict(toml='[environment]\nnetwork_mode = "allowlist"\nallowed_hosts = ["a.b"]'), "not supported: [environment]"),
    (dict(toml='[verifier]\nallowed_hosts = ["a.b"]'), "[verifier] allowed_hosts"), (dict(toml='[agent]\nnetwork_mode = "no-network"'), "a network for agent alone"),
    (dict(toml='[verifier]\nenvironment_mode = "separate"'), "[verifier] environment_mode but for shared"), (dict(toml='[verifier]\nuser = "bob"'), "user"),
    (dict(toml='[environment]\nworkdir = "/srv"'), "workdir"), (dict(toml='[environment.env]\nA = "1"'), "[environment] env"),
    (dict(toml='[verifier.env]\nTOKEN = "${TOKEN}"'), "host's"), (dict(toml='[[environment.mcp_servers]]\nname = "m"'), "mcp_servers"),
    (dict(toml='[environment.healthcheck]\ncommand = "true"'), "healthcheck"),
]


def test_zoo_of_task_folders(tmp_path, capsys):
    """Every feature and every fault, in one folder: tasks have what their task.toml says, the others are left out, each with its
    reason, and the summary counts them. One by one they come out the same, and a fault is then a UserError."""
    wanted, reasons = {}, {}
    for i, (holds, outcome) in enumerate(ZOO):
        make_task(tmp_path / f"{i:02}", **holds)
        (wanted if isinstance(outcome, dict) else reasons)[f"{i:02}"] = outcome
    tasks = {t.name: t for t in tmax.load_tasks(str(tmp_path), DOCKER)}
    plain = tmax.Task("", tmp_path, "Do it.")
    assert tasks == {name: dataclasses.replace(plain, name=name, path=tmp_path / name, **changes) for name, changes in wanted.items()}
    summary = capsys.readouterr().out
    assert f"{len(wanted)} of {len(ZOO)} tasks taken, {len(reasons)} left out" in summary
    assert sum(int(line.split()[0]) for line in summary.splitlines()[1:]) == len(reasons)
    for name in tasks:
        assert tmax.load_tasks(str(tmp_path / name), DOCKER) == [tasks[name]]
    for name, reason in reasons.items():
        with pytest.raises(tmax.UserError, match=re.escape(str(tmp_path / name))) as error:
            tmax.load_tasks(str(tmp_path / name), DOCKER)
        assert reason in str(error.value) and "\n" not in str(error.value), error.value


def test_bubblewrap_takes_no_task_that_needs_an_image(tmp_path, capsys):
    """docker_image, image.txt and a Dockerfile are three ways to need one; seeds alone are not. Docker needs one, or --image. Nor
    does bubblewrap take a task with a user of its own."""
    make_task(tmp_path / "plain", seeds={"a": "x"})
    make_task(tmp_path / "toml", toml='[environment]\ndocker_image = "i"')
    make_task(tmp_path / "txt", files={"image.txt": "i"})
    make_task(tmp_path / "file", files={"environment/Dockerfile": "FROM i"})
    make_task(tmp_path / "user", toml="[agent]\nuser = 'worker'")
    docker = dataclasses.replace(DOCKER, image="")
    assert [t.name for t in tmax.load_tasks(str(tmp_path), docker)] == ["file", "toml", "txt"]
    assert "2  names no container image: --image gives one (plain, user)" in capsys.readouterr().out
    assert [t.name for t in tmax.load_tasks(str(tmp_path), CFG)] == ["plain"]
    assert re.search(r"3  needs a container image.*--sandbox docker \(file, toml, txt\)\n +1  needs a user.*\(user\)", capsys.readouterr().out)


def test_one_task_folder_or_a_folder_of_them(tmp_path, monkeypatch):
    """Both forms of --tasks; names in order; files and hidden folders beside the tasks do not matter; `.` is a name too."""
    for name in "cab":
        make_task(tmp_path / name)
    (tmp_path / "README.md").write_text("tasks")
    (tmp_path / ".git").mkdir()
    assert [t.name for t in tmax.load_tasks(str(tmp_path), CFG)] == ["a", "b", "c"]
    monkeypatch.chdir(tmp_path / "b")
    assert [(t.name, t.path) for t in tmax.load_tasks(".", CFG)] == [("b", tmp_path / "b")]


@pytest.mark.parametrize("flags, left", [
    (dict(include=["a*", "b2"]), ["a1", "a2", "b2"]), (dict(exclude=["*2"]), ["a1", "b1"]),
    (dict(include=["a*"], exclude=["?1"]), ["a2"]), (dict(include=["c"]), []), (dict(exclude=["*"]), []),
], ids=str)
def test_include_and_exclude(tmp_path, capsys, flags, left):
    """Name patterns choose tasks; what they leave out is counted, and is not read, so it may be broken. To leave none of all sources
    is an error."""
    for name in ("a1", "a2", "b1", "b2"):
        make_task(tmp_path / name, test="exit" if name in left else None)
    assert [t.name for t in tmax.load_tasks(str(tmp_path), dataclasses.replace(CFG, **flags))] == left
    assert f"{len(left)} of 4 tasks taken, 0 left out" in capsys.readouterr().out
    cfg = dataclasses.replace(CFG, **flags)
    with contextlib.nullcontext() if left else pytest.raises(tmax.UserError, match="--include"):
        assert len(tmax.all_tasks([str(tmp_path)] * 2, cfg)) == 2 * len(left)


def test_no_usable_task_is_an_error(tmp_path):
    """Nothing there, an empty folder, folders without tests."""
    (tmp_path / "empty").mkdir()
    make_task(tmp_path / "untested/a", test=None)
    for folder in ("nowhere", "empty", "untested"):
        with pytest.raises(tmax.UserError, match=folder):
            tmax.load_tasks(str(tmp_path / folder), CFG)


def test_tests_are_not_read_at_load(tmp_path, monkeypatch):
    """Hidden tests stay hidden until a rollout is graded: no file under tests/ is opened."""
    make_task(tmp_path / "a")
    opened = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    tmax.load_tasks(str(tmp_path), CFG)
    mine = [path for path in opened if path.startswith(str(tmp_path))]
    assert mine and not [path for path in mine if "/tests/" in path]


def test_task_order(tmp_path):
    """Every epoch is a permutation, another one each time, and the same again for the same seed."""
    tasks = [tmax.Task(str(i), tmp_path, "") for i in range(20)]
    epochs = [[int(tmax.task_at(tasks, 20 * e + i, seed=1).name) for i in range(20)] for e in range(4)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs) and len(set(map(tuple, epochs))) == 4
    assert epochs[2] == [int(tmax.task_at(tasks, 40 + i, seed=1).name) for i in range(20)]
    assert epochs[0] != [int(tmax.task_at(tasks, i, seed=2).name) for i in range(20)]


# ---------------------------------------------------------------------------------------------------------------------
# Data sets and archives
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hugging Face cache, offline."""
    assets = functools.partial(huggingface_hub.cached_assets_path, assets_dir=tmp_path / "assets")
    monkeypatch.setattr(huggingface_hub, "cached_assets_path", assets)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def as_snapshot(hub, folder, name="o/tasks", revision="main", commit="c" * 40):
    """Lay a folder out as the hub's client does in its cache: files named by hashes, links to them in a snapshot."""
    repo = hub / f"datasets--{name.replace('/', '--')}"
    for i, file in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        link = repo / "snapshots" / commit / file.relative_to(folder)
        for parent in (link.parent, repo / "blobs", repo / "refs"):
            parent.mkdir(parents=True, exist_ok=True)
        (repo / "blobs" / f"{commit}{i}").write_bytes(file.read_bytes())
        link.symlink_to(os.path.relpath(repo / "blobs" / f"{commit}{i}", link.parent))
    (repo / "refs" / revision).write_text(commit)


def make_dataset(folder, form="parquet", ids=("t1", "t2"), rows=("t1", "t2", "gone")):
    """The form of tmax-15k-open-instruct: rows with the card's columns, and task-data.tar.gz with the folders."""
    (folder / "data").mkdir(parents=True)
    table = [dict(messages=[dict(role="user", content="x")], ground_truth=name, dataset="passthrough", source="s",
                  env_config=dict(env_name="sandbox", task_id=name, image=f"image:{name}" if name != "t2" else None)) for name in rows]
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / "data/train-00000-of-00001.parquet")
    else:
        (folder / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    with tarfile.open(folder / "task-data.tar.gz", "w:gz") as tar:
        for name in ids:
            tar.add(make_task(folder.with_name(f"{folder.name}-{name}"), seeds={"s": "x"}, files={"image.txt": f"own:{name}"}), arcname=name)
    return folder


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_dataset_with_rows_and_archive(hub, tmp_path, capsys, form):
    """A stand-in for tmax-15k-open-instruct with the card's columns, offline, from the hub's cache and as a local copy: a row's
    image goes before image.txt, a row without a folder is left out, a folder without a row is no task."""
    local = make_dataset(tmp_path / "local", form, ids=("t1", "t2", "rowless"))
    as_snapshot(hub, local, "allenai/tmax-15k-open-instruct")
    for source in ("allenai/tmax-15k-open-instruct", "allenai/tmax-15k-open-instruct@main", str(local)):
        tasks = tmax.load_tasks(source, DOCKER)
        assert [(t.name, t.image) for t in tasks] == [("t1", "image:t1"), ("t2", "own:t2")]
        assert (tasks[0].path / "environment/seeds/s").read_text() == "x"
        assert "1  there is no folder for this row (gone)" in capsys.readouterr().out
    with pytest.raises(tmax.UserError, match="nothing@here"):
        tmax.load_tasks("o/nothing@here", DOCKER)


def test_dataset_of_folders(hub, tmp_path):
    """A data set of loose Harbor folders, at two revisions: its files are files, not links into the hub's cache, whose targets
    would be missing in a sandbox and in an image build."""
    for revision, commit in (("main", "a" * 40), ("old", "b" * 40)):
        (tmp_path / "assets/tmax/tasks" / commit / "partial/t").mkdir(parents=True)  # of a start that was broken off
        make_task(tmp_path / revision / "t", instruction=revision, seeds={"s": "x"})
        as_snapshot(hub, tmp_path / revision, revision=revision, commit=commit)
    new, = tmax.load_tasks("o/tasks", CFG)
    old, = tmax.load_tasks("o/tasks@old", CFG)
    assert (new.instruction, old.instruction) == ("main", "old")
    assert (new.path / "tests/test.sh").is_file() and not [p for p in new.path.rglob("*") if p.is_symlink()]


@pytest.mark.parametrize("rows", ["", "no parquet", '{"env_config": null}', '{"env_config": {"image": "i"}}', '{"a": 1}', "{"])
def test_rows_that_cannot_be_read_are_named(hub, tmp_path, rows):
    """A broken file of rows is a UserError in one line that names it; rows that lead out are left out."""
    make_dataset(tmp_path / "d", "jsonl", rows=())
    file = tmp_path / "d" / ("rows.jsonl" if rows.startswith("{") else "rows.parquet")
    file.write_text(rows)
    with pytest.raises(tmax.UserError, match=re.escape(str(file))) as error:
        tmax.load_tasks(str(tmp_path / "d"), DOCKER)
    assert "\n" not in str(error.value)


def test_a_row_leads_nowhere_else(hub, tmp_path):
    """A task id is the name of a folder in the archive and nothing else."""
    make_task(tmp_path / "outside")
    make_dataset(tmp_path / "d", rows=("../outside", str(tmp_path / "outside"), ".", "", "t1/../t1", "t1"))
    assert [t.name for t in tmax.load_tasks(str(tmp_path / "d"), DOCKER)] == ["t1"]


def member(name, kind=tarfile.REGTYPE, link="", data=b""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, io.BytesIO(data)


SYM, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE


@pytest.mark.parametrize("members, named", [
    ([("../out",)], "../out"), ([("t1/../../out",)], "t1/../../out"), ([("/tmp/out",)], "/tmp/out"), ([("//out",)], "//out"),
    ([("t1/a", SYM, "/etc/passwd")], "t1/a"), ([("t1/a", SYM, "../../out")], "t1/a"), ([("t1/a", HARD, "../out")], "t1/a"),
    ([("t1/a", HARD, "/etc/passwd")], "t1/a"), ([("t1/a", SYM, "gone")], "t1/a"),
    ([("t1/a", SYM, "d/../../x"), ("t1/d", SYM, ".")], "t1/a"),                         # out, once d is there
    ([("t1/d", SYM, "."), ("t1/d/f",)], "t1/d/f"), ([("t1/d", SYM, "f"), ("t1/d",)], "t1/d"),
    ([("s", SYM, "t1/.."), ("t1/a/h", HARD, "s")], "t1/a/h"),
    ([("t1/n", tarfile.CHRTYPE)], "t1/n"), ([("t1/n", tarfile.BLKTYPE)], "t1/n"), ([("t1/n", tarfile.FIFOTYPE)], "t1/n"),
    ([("t1/a", SYM, "a")], "t1/a"), ([("t1/a", SYM, "b"), ("t1/b", SYM, "a")], "t1/a"),
], ids=str)
def test_hostile_archives_are_refused(hub, tmp_path, members, named):
    """Paths and links out, directly or through one another, and devices: a UserError names the member, and nothing was written
    outside, and nothing is taken for unpacked at the next start."""
    make_dataset(tmp_path / "d", ids=())
    with tarfile.open(tmp_path / "d/task-data.tar.gz", "w:gz") as tar:
        for entry in [("t1/instruction.md",), *members]:
            tar.addfile(*member(*entry))
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    for _ in range(2):
        with pytest.raises(tmax.UserError, match=re.escape(named)):
            tmax.load_tasks(str(tmp_path / "d"), DOCKER)
    assert [p for p in sorted(str(p) for p in tmp_path.rglob("*")) if p not in before and "/assets" not in p] == []
    assert not list((tmp_path / "assets").rglob("tasks/t1")) and not Path("/tmp/out").exists()


def test_links_that_stay_inside_are_kept(hub, tmp_path):
    """A link to a file beside it, and a second name of a file."""
    make_dataset(tmp_path / "d", ids=())
    with tarfile.open(tmp_path / "d/task-data.tar.gz", "w:gz") as tar:
        tar.add(make_task(tmp_path / "t"), arcname="./t1")
        tar.addfile(*member("./t1/link", SYM, "instruction.md"))
        tar.addfile(*member("./t1/hard", HARD, "./t1/instruction.md"))
    task, = tmax.load_tasks(str(tmp_path / "d"), DOCKER)
    assert (task.path / "link").read_text() == (task.path / "hard").read_text() == "Do it."


@pytest.mark.parametrize("header", [dict(path="t1/a\0b"), dict(mtime="1e30"), dict(mtime="nan")], ids=str)
def test_a_header_that_cannot_be_meant_is_refused(hub, tmp_path, header):
    """Extended headers hold any text."""
    make_dataset(tmp_path / "d", ids=())
    info, data = member("t1/instruction.md")
    info.pax_headers = header
    with tarfile.open(tmp_path / "d/task-data.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, data)
    with pytest.raises(tmax.UserError, match="task-data.tar.gz"):
        tmax.load_tasks(str(tmp_path / "d"), DOCKER)


def test_a_cut_archive_is_refused(hub, tmp_path):
    """Half a download, or no archive at all."""
    archive = make_dataset(tmp_path / "d") / "task-data.tar.gz"
    for data in (archive.read_bytes()[:-100], b"", b"<html>"):
        archive.write_bytes(data)
        with pytest.raises(tmax.UserError, match="task-data.tar.gz"):
            tmax.load_tasks(str(tmp_path / "d"), DOCKER)


def test_unpacking_is_shared_and_repaired(hub, tmp_path, monkeypatch):
    """One start is killed in the middle of unpacking; two more at once then make it whole, once; the next finds it there."""
    ids = [f"t{i:04}" for i in range(400)]
    data = make_dataset(tmp_path / "d", ids=(), rows=ids)
    with tarfile.open(data / "task-data.tar.gz", "w:gz") as tar:
        source = make_task(tmp_path / "t", files={"image.txt": "i"})
        for name in ids:
            tar.add(source, arcname=name)

    def load(members):
        made, unpack, extract = [], tmax.unpack, tarfile.TarFile.extract
        left = iter(range(members))
        tarfile.TarFile.extract = lambda *args, **kw: extract(*args, **kw) if next(left, None) is not None else os.kill(os.getpid(), 9)
        tmax.unpack = lambda *args: (made.append(1), unpack(*args))
        names = [t.name for t in tmax.load_tasks(str(data), DOCKER)]
        (tmp_path / f"loaded-{os.getpid()}").write_text(json.dumps([names, len(made)]))

    def start(members=10_000):
        (process := multiprocessing.get_context("fork").Process(target=load, args=(members,))).start()
        return process
    start(members=500).join()
    assert len(list((tmp_path / "assets").glob("*/*/*/partial/*"))) > 90 and not list((tmp_path / "assets").glob("*/*/*/tasks"))
    for process in [start(), start()]:
        process.join()
    loaded = [json.loads(file.read_text()) for file in tmp_path.glob("loaded-*")]
    assert [names for names, _ in loaded] == [ids, ids] and sum(made for _, made in loaded) == 1
    monkeypatch.setattr(tmax, "unpack", lambda *_: pytest.fail("unpacked again"))
    assert len(tmax.load_tasks(str(data), DOCKER)) == 400


def bench_load(folder):
    """Load all tasks: seconds, how many, and the most memory of the process before and after, in MiB."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, time.monotonic()
    count = len(tmax.load_tasks(folder, DOCKER))
    return dict(seconds=time.monotonic() - start, count=count, before=before, after=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)


@pytest.mark.bench
def test_benchmark_load(tmp_path, capsys):
    """15,000 task folders of the usual form, with 3,000 characters of instruction each, loaded in a fresh process."""
    files = {"environment/Dockerfile": "FROM x", "tests/test_outputs.py": "assert True\n" * 200, "solution/solve.sh": "true"}
    for i in range(15_000):
        make_task(tmp_path / f"task-{i:05}", toml=FULL, instruction=f"{i} " * 500, files=files)
    figures = [in_fresh_process(bench_load, str(tmp_path)) for _ in range(3)]
    with capsys.disabled():
        for f in figures:
            print("\nload_tasks: {count} tasks in {seconds:.1f} s, most memory {before} MiB before, {after} MiB after".format(**f), end="")


# ---------------------------------------------------------------------------------------------------------------------
# Tool calls, submission, observations
# ---------------------------------------------------------------------------------------------------------------------

def hermes(command, ascii=True):
    return f'<tool_call>\n{json.dumps({"name": "bash", "arguments": {"command": command}}, ensure_ascii=ascii)}\n</tool_call>'


def xml(command):
    return f"<tool_call>\n<function=bash>\n<parameter=command>\n{command}\n</parameter>\n</function>\n</tool_call>"


BOTH = pytest.mark.parametrize("form", [hermes, xml])


@BOTH
@pytest.mark.parametrize("text, commands", [
    ("no call at all", []), ("", []), ("A", ["a"]), ("first A then\n\nB end", ["a", "b"]),
    ("<think>hm</think>\n\nA", ["a"]), ("<think>B</think>A", ["a"]), ("B</think>A", ["a"]), ("<think>A", []), ("<think>A</think>", []),
    ("A<think>B", ["a"]), ("<think>B</think>A<think>B</think>A", ["a", "a"]), ("<think><tool_call>{</think>A", ["a"]),
    ("<tool_call>{ or so</think>A", ["a"]),
])
def test_calls_are_found_outside_thinking(form, text, commands):
    """Where A and B stand for calls: all that are not thought, closed or not, opened by the template or not."""
    assert tmax.parse_tool_calls(text.replace("A", form("a")).replace("B", form("b"))) == commands


@BOTH
@pytest.mark.parametrize("command", [
    "", "ls", "echo '</tool_call>'", "cat <<'X'\n  indented\n\nX", "\n\nls\n\n", "echo ünïcödé 🌲", 'echo "a\\n\'b\'" \\', "a\tb\r\nc\0d",
    "grep '</think>' log", "grep '<think>' log", "echo '<tool_call>'", "echo '</parameter>' '</function>'", "echo '\ud800'",
])
def test_commands_come_back_as_they_were(form, command):
    """Quoting, newlines, tags of the format itself and lone surrogates."""
    assert tmax.parse_tool_calls("Well. " + form(command) + "\n" + form("pwd")) == [command, "pwd"]


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(st.text(st.characters()) | st.sampled_from(
    ["<tool_call>", "</tool_call>", "<think>", "</think>", "<function=bash>", "</function>", "<parameter=command>", "</parameter>",
     "\n", " ", '"', "\\", "{", "}"])).map("".join), st.booleans())
def test_any_command_comes_back(command, ascii):
    """Round trip in both forms; XML has no escapes, so a command that closes its own parameter is left out there."""
    assert tmax.parse_tool_calls(hermes(command, ascii)) == [command]
    if not re.search(r"</parameter>\s*(</function>|<parameter=)", command):
        assert tmax.parse_tool_calls(xml(command)) == [command]


@pytest.mark.parametrize("text", [
    hermes("ls")[:-len("</tool_call>")], xml("ls")[:-len("</tool_call>")], hermes("ls")[:30], xml("ls")[:50], "<tool_call>",
    "<tool_call>\n</tool_call>", hermes("ls").replace("bash", "python"), xml("ls").replace("bash", "python"),
    "<tool_call>ls</tool_call>", '<tool_call>["bash", "ls"]</tool_call>', '<tool_call>"bash"</tool_call>',
    '<tool_call>{"name": "bash"}</tool_call>', '<tool_call>{"arguments": {"command": "ls"}}</tool_call>',
    '<tool_call>{"name": "bash", "arguments": "ls"}</tool_call>', '<tool_call>{"name": "bash", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "bash", "arguments": {"command": ["ls"]}}</tool_call>',
    '<tool_call>{"name": "bash", "arguments": {"command": null}}</tool_call>',
    '<tool_call>{"name": ["bash"], "arguments": {"command": "ls"}}</tool_call>',
    "<tool_call><function=bash></function></tool_call>",
    xml("ls").replace("</function>", "<parameter=timeout>\n5\n</parameter>\n</function>"),
    "<tool_call>" + "[" * 100_000, '<tool_call>{"name": ' + "9" * 10_000 + "}</tool_call>",
    hermes("ls") + "<tool_call>", "<tool_call>oops</tool_call>" + xml("ls"),
], ids=lambda text: text[:60])
def test_malformed_calls_raise(text):
    """A call that cannot be read, or whose tool or argument does not exist, spoils the turn."""
    with pytest.raises(tmax.FormatError):
        tmax.parse_tool_calls(text)


@pytest.mark.parametrize("command, submits", [
    (SUBMIT, True), (f"  {SUBMIT}\n", True), (f"\n\n{SUBMIT}", True), (f'echo "{MARKER}"', True), (f"echo '{MARKER}'", True),
    (f"echo \t{MARKER}", True), (f"'echo' {MARKER[:9]}\"{MARKER[9:]}\"", True),
    (MARKER, False), ("", False), ("echo", False), (f"{SUBMIT}; ls", False), (f"{SUBMIT};", False), (f"{SUBMIT} && ls", False),
    (f"ls; {SUBMIT}", False), (f"ls\n{SUBMIT}", False), (f"{SUBMIT}\nls", False), (f"echo\n{MARKER}", False),
    (f'echo "{MARKER}\n"', False), (f"echo -n {MARKER}", False), (f"echo {MARKER} {MARKER}", False), (f"echo x{MARKER}", False),
    (f"echo {MARKER.lower()}", False), (f"cat <<< {MARKER}", False), ("cat prompt.txt", False), (f"printf {MARKER}", False),
    (f'echo "{MARKER}', False), (f"echo '{MARKER}", False), (f"echo {MARKER}\\", False), (f"echo '{MARKER} '", False),
    (f"echo {MARKER} > out", False), (f"# {SUBMIT}", False),
])
def test_only_the_exact_echo_submits(command, submits):
    """The command, split as a shell would, is `echo` and the marker, nothing else."""
    assert tmax.is_submission(command) is submits


def test_observation_form():
    """Short output as it is, (no output), the exit code at the end."""
    assert tmax.render_observation("a\nb\n", 0) == "a\nb\n\n\n(exit_code=0)"
    assert tmax.render_observation("", 137) == "(no output)\n\n(exit_code=137)"


def test_observation_boundary():
    """10,000 characters stand as they are; from 10,001 on a hint, the first and the last 5,000."""
    assert tmax.render_observation("ü" * 10_000, 1) == "ü" * 10_000 + "\n\n(exit_code=1)"
    text = tmax.render_observation("a" * 5_000 + "X" + "b" * 5_000, 1)
    assert "X" not in text.replace("(exit", "") and text.endswith("b" * 5_000 + "\n\n(exit_code=1)")
    hint, _, rest = text.partition("\n")
    assert "5000 characters" in hint and rest.startswith("a" * 5_000) and text.count("b" * 5_000) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Chat format
# ---------------------------------------------------------------------------------------------------------------------

QWEN = """{%- if tools %}<|im_start|>system
{{ messages[0].content }}

Functions you may use:
{%- for tool in tools %}{{ "\n" + (tool | tojson) }}{% endfor %}<|im_end|>
{% else %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for m in messages[1:] %}
{%- if m.role == "tool" %}
{%- if loop.previtem is not defined or loop.previtem.role != "tool" %}{{ "<|im_start|>user" }}{% endif %}
{{- "\n<tool_response>\n" + m.content + "\n</tool_response>" }}
{%- if loop.last or loop.nextitem.role != "tool" %}{{ "<|im_end|>\n" }}{% endif %}
{%- else %}{{ "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""
LLAMA = """{{- "<|begin_of_text|>" }}
{%- for m in messages %}
{{- "<|start_header_id|>" + ("ipython" if m.role == "tool" else m.role) + "<|end_header_id|>\n\n" }}
{%- if loop.first and tools %}{% for tool in tools %}{{ (tool | tojson) + "\n\n" }}{% endfor %}{% endif %}
{{- m.content + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>\n\n" }}{% endif %}"""
QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
               "<think>", "</think>"]
LLAMA_TOKENS = ["<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"]


def small_tokenizer(template, special, eos):
    """A byte-level tokenizer, trained on a few words; half of its added tokens are not `special`, as in Qwen3."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(["You solve tasks in a Linux terminal with the bash tool. (exit_code=0) (no output)"] * 3,
                            trainers.BpeTrainer(vocab_size=330, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_special_tokens([AddedToken(t, special=True) for t in special if t.startswith("<|")])
    bpe.add_tokens([AddedToken(t, special=False) for t in special if not t.startswith("<|")])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, eos_token=eos, pad_token=special[0])


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """make_tiny's folders and demonstrations, without a warm start."""
    return tmax.make_tiny(tmp_path_factory.mktemp("tiny"), seed=3)


@pytest.fixture(scope="session")
def tokenizers(tiny_model):
    return {"tiny": AutoTokenizer.from_pretrained(tiny_model[0]), "qwen": small_tokenizer(QWEN, QWEN_TOKENS, "<|im_end|>"),
            "llama": small_tokenizer(LLAMA, LLAMA_TOKENS, "<|eot_id|>")}


FAMILIES = pytest.mark.parametrize("family, header", [("tiny", "<|im_start|>assistant\n"), ("qwen", "<|im_start|>assistant\n"),
                                                      ("llama", "<|start_header_id|>assistant<|end_header_id|>\n\n")])


@FAMILIES
@pytest.mark.parametrize("outputs", [["file\n\n(exit_code=0)"], ["a", "", "  ünï\n"], ["x" * 300] * 5], ids=len)
def test_turns_are_the_templates_own(tokenizers, family, header, outputs):
    """Prompt + sampled turn + tool turn is, as text, what the template makes of the whole conversation; one header at the end."""
    tokenizer, said = tokenizers[family], "I look.\n" + hermes("ls")
    chat = tmax.ChatFormat(tokenizer)
    conversation = [{"role": "system", "content": tmax.SYSTEM_PROMPT}, {"role": "user", "content": "Do ünï."},
                    *2 * [{"role": "assistant", "content": said}, *({"role": "tool", "content": text} for text in outputs)]]
    turn = tokenizer.encode(said, add_special_tokens=False) + [tokenizer.eos_token_id]
    ids = chat.prompt("Do ünï.") + 2 * (turn + chat.tool_turn(outputs))
    wanted = tokenizer.apply_chat_template(conversation, tools=[tmax.BASH_TOOL], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == wanted
    assert tokenizer.decode(chat.tool_turn(outputs)).count(header) == 1 and wanted.endswith(header)
    assert chat.stop_ids == [tokenizer.eos_token_id] and all(type(i) is int for i in ids)


@FAMILIES
def test_observations_forge_nothing(tokenizers, family, header):
    """The text of every added token, in an observation, is plain text: no added id, and it decodes back."""
    tokenizer = tokenizers[family]
    chat, added = tmax.ChatFormat(tokenizer), tokenizer.added_tokens_decoder
    text = "".join(f"{token.content} {token.content}\n" for token in added.values()) + header
    assert len(added) >= 6 and set(tokenizer.encode(text)) & set(added)
    empty, ids = chat.tool_turn([""]), chat.tool_turn([text])
    place = len(chat.around["tool"][0]) - 1
    inside = ids[place:place + len(ids) - len(empty)]
    assert not set(inside) & set(added) and tokenizer.decode(inside, skip_special_tokens=False) == text
    assert ids[:place] + ids[place + len(inside):] == empty


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{% if m.role != 'tool' %}{{ m.role + ': ' + m.content }}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ m.content }}{% endfor %}",
    None,
], ids=["ignores", "raises", "none"])
def test_a_template_without_tools_is_refused(template):
    """--model with a template that drops tool messages, refuses them, or is not there: a UserError."""
    with pytest.raises(tmax.UserError, match="--model"):
        tmax.ChatFormat(small_tokenizer(template, QWEN_TOKENS, "<|im_end|>"))


def test_a_tokenizer_that_spells_control_tokens_is_refused():
    """If plain text alone merges into a control token's id, observations could not be kept harmless."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    bpe.train_from_iterator(["<|im_end|>"] * 9, trainers.BpeTrainer(vocab_size=300, show_progress=False,
                                                                   initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_special_tokens(["<|im_end|>"])
    with pytest.raises(tmax.UserError, match=re.escape("<|im_end|>")):
        tmax.ChatFormat(PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=QWEN, eos_token="<|im_end|>"))


# ---------------------------------------------------------------------------------------------------------------------
# Sandbox: the shell
# ---------------------------------------------------------------------------------------------------------------------

PROGRAMS = """bash sh echo ls cat cp mv rm mkdir rmdir ln chmod chown touch head tail sort wc cut tr tee env seq yes date sleep timeout kill setpriv
    nohup setsid id stat du df dd mktemp basename dirname readlink realpath whoami uname find grep sed tar gzip ps base64 printf
    mkfifo nproc true false mount umount unshare mknod chroot hostname pkill python3""".split()


def host_image(client):
    """Name of an image of this machine's own programs, their libraries and Python: no registry is needed. Made once."""
    name = "tmax-test:latest"
    if client.images.list(name):
        return name
    python = Path(subprocess.check_output(["/usr/bin/python3", "-c", "import os; print(os.__file__)"], text=True)).parent
    programs = [path for path in (shutil.which(p, path="/usr/bin:/usr/sbin:/bin:/sbin") for p in PROGRAMS) if path]
    linked = subprocess.run(["ldd", *map(os.path.realpath, programs), *python.glob("lib-dynload/*.so")], capture_output=True, text=True)
    paths = {*map(Path, programs), *map(Path, re.findall(r"(/\S+) \(0x", linked.stdout))}
    paths |= {Path(os.path.realpath(path)) for path in paths}
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for link in ("/bin", "/sbin", "/lib", "/lib64"):
                if os.path.islink(link):
                    tar.add(link)
            for path in {path.parent.resolve() / path.name for path in paths}:
                tar.add(path)
            tar.add(python, filter=lambda info: None if re.search(r"/(test|__pycache__|idlelib|config-[^/]+)$", info.name) else info)
            for folder, mode in {"tmp": 0o1777, "root": 0o700, "app": 0o755, "workspace": 0o755, "home/worker": 0o777, "etc": 0o755, "opt": 0o755, "var": 0o755}.items():
                info = tarfile.TarInfo(folder)
                info.type, info.mode = tarfile.DIRTYPE, mode
                tar.addfile(info)
            users = b"root:x:0:0::/root:/bin/bash\nworker:x:1000:1000::/home/worker:/bin/bash\n"
            for info, text in ((tarfile.TarInfo("etc/passwd"), users), (tarfile.TarInfo("etc/group"), b"root:x:0:\nworker:x:1000:\n")):
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))
        file.seek(0)
        client.api.import_image_from_data(file, repository="tmax-test", tag="latest")
    return name


@pytest.fixture(scope="session")
def image():
    """Name of an image in the Docker engine. Without an engine, tests on docker are skipped."""
    if not tmax.engine_answers():
        pytest.skip("no Docker engine answers; .ci/run starts one")
    return host_image(tmax.docker_client())


@pytest.fixture(params=["bwrap", "docker"])
def cfg(request):
    """CFG for each kind of sandbox."""
    if request.param == "bwrap":
        return CFG
    return dataclasses.replace(CFG, sandbox="docker", image=request.getfixturevalue("image"), network="none")


def in_sandbox(work, task=tmax.Task("t", Path("/nonexistent"), ""), cfg=CFG):
    """Run `work(box)`, a coroutine function, in a sandbox of its own."""
    async def main():
        async with tmax.Sandbox(task, cfg) as box:
            return await work(box)
    return asyncio.run(main())


def shell(*commands, timeout=100, **kw):
    """The Outputs of commands, run one after the other in one sandbox."""
    async def work(box):
        return [await box.run(command, timeout) for command in commands]
    return in_sandbox(work, **kw)


@pytest.mark.parametrize("steps", {
    "directory and variables": [("cd /tmp; export A=1; B='x  y'", "", 0), ('echo "$PWD $A $B"', "/tmp 1 x  y\n", 0)],
    "array, function, umask": [("a=(1 '2 3'); f() { echo \"${a[1]}\"; }; umask 027", "", 0), ("f; umask", "2 3\n0027\n", 0)],
    "value with newline and quotes": [("export V=$'a\\nb \"q\" $x `y`'", "", 0), ('printf %s "$V"', 'a\nb "q" $x `y`', 0)],
    "readonly": [("readonly R=1; export R", "", 0), ("echo $R", "1\n", 0), ("echo $R", "1\n", 0)],
    "heredoc": [("cat <<'X' >/tmp/h\nline $A 'q' \"\nX\ncat /tmp/h", "line $A 'q' \"\n", 0)],
    "exit": [("cd /usr; A=1; exit 3", "", 3), ("echo $PWD $A", "/usr 1\n", 0)],
    "set -e": [("A=1; set -e; false; echo no", "", 1), ("false; echo $A", "1\n", 0)],
    "set -u": [("set -u; echo $nothing; echo no", "unbound", None), ("echo [$nothing]", "[]\n", 0)],
    "exec": [("export A=1", "", 0), ("cd /tmp; exec echo replaced", "replaced\n", 0), ("echo $A", "1\n", 0)],
    "exec >/dev/null": [("exec >/dev/null; echo hidden", "", 0), ("echo shown", "shown\n", 0)],
    "open quote": [("A=1", "", 0), ('echo "abc', "quote|matching|EOF", None), ("echo $A", "1\n", 0)],
    "comment and backslash at the end": [("echo hi # c", "hi\n", 0), ("echo ho \\", "ho", 0), ("echo x", "x\n", 0)],
    "own exit trap": [("trap 'echo bye' EXIT; cd /opt", "bye\n", 0), ("pwd", "/opt\n", 0)],
    "kill of itself": [("A=1", "", 0), ("kill -9 $$", "", 137), ("echo $A", "1\n", 0)],
    "kill of everything": [("A=1", "", 0), ("kill -9 -1", "", None), ("echo $A", "1\n", 0)],
    "all signals to process 1": [("for s in {1..31}; do kill -$s 1; done 2>/dev/null; echo sent", "sent\n", 0),
                                 *((f"kill -{s} 1; sleep .01; echo sent", "sent\n", 0) for s in range(1, 65) if s not in (32, 33))],
    "no input": [("cat; read x; echo eof", "eof\n", 0), ("read -t 5 x </dev/tty; echo $?", "1\n", 0)],
    "broken PATH": [("export PATH=/nonexistent", "", 0), ("echo hi", "hi\n", 0), ("ls", "not found", 127),
                    ("export PATH=/usr/bin:/bin; ls /usr >/dev/null && echo fixed", "fixed\n", 0)],
    "bytes": [(r"printf '\xff\x00z'", "\ufffd\0z", 0), (r"printf '\xe2\x82\xac'", "€", 0)],
    "stderr in order": [("echo a; echo b >&2; echo c", "a\nb\nc\n", 0)],
    "deleted directory": [("mkdir -p /tmp/gone; cd /tmp/gone; rmdir /tmp/gone", "", 0), ("echo ok 2>/dev/null", "ok\n$", 0)],
    "huge variable": [("export BIG=$(head -c 3000000 /dev/zero | tr '\\0' x)", "", 0), ("echo ${#BIG}; ls /", "3000000\n", 126),
                      ("unset BIG", "", 0), ("ls / >/dev/null && echo ok", "ok\n", 0)],
    "background job does not talk into the next answer": [
        ("(while :; do echo spam; sleep .1; done) & sleep .3", "spam\n", 0), ("sleep .5; echo clean", "clean\n", 0)],
    "background job that floods": [("yes & sleep .1", "y\n", 0), ("kill %1 2>/dev/null; echo here", "here\n", 0)],
    "background job lives on": [("sleep 7777 >/dev/null 2>&1 & echo $! >/tmp/pid", "", 0), ("kill -0 $(cat /tmp/pid) && echo alive", "alive\n$", 0)],
    "background job lives on after exit code 124": [
        ("sleep 7777 >/dev/null 2>&1 & echo $! >/tmp/pid; timeout .2 sleep 9", "", 124), ("kill -0 $(cat /tmp/pid) && echo alive", "alive\n", 0)],
    "150 KB": [("cat >/tmp/b <<'X'\n" + "y" * 150_000 + "\nX\nwc -c </tmp/b", "150001\n", 0)],
    "10 MB": [("cat >/tmp/b <<'X'\n" + "y" * 10_000_000 + "\nX\nwc -c </tmp/b", "10000001\n", 0), ("echo ok", "ok\n", 0)],
    "lone surrogate and NUL": [("echo 'a\ud800b'; echo 'c\0d'", "a\\?b\n", 0)],
}.items(), ids=lambda steps: steps[0])
def test_shell_keeps_its_state(steps, cfg):
    """Rows of (command, what it prints, exit code or None), each row in one sandbox: state stays, whatever a command does."""
    outputs = shell(*(command for command, _, _ in steps[1]), cfg=cfg)
    for (command, text, code), output in zip(steps[1], outputs):
        same = output.text == text or (text and re.search(text, output.text))
        assert same and not output.timed_out, (command[:80], output.text[-300:], output.exit_code)
        assert code is None or output.exit_code == code, (command[:80], output)


@pytest.mark.parametrize("command", ["echo started; sleep 100", "echo started; trap '' TERM; sleep 100; sleep 100",
                                     "echo started; sleep 100 & wait", "echo started; while :; do :; done"])
def test_timeout_ends_a_command_only(command, cfg):
    """What it printed is returned; directory, variables, files and a server that was started earlier stay."""
    async def work(box):
        await box.run("cd /var; A=1; echo kept >/tmp/f; sleep 7777 >/dev/null 2>&1 & echo $! >/tmp/pid")
        return await box.run(command, 2), await box.run("kill -0 $(cat /tmp/pid) && echo $PWD $A $(cat /tmp/f)")
    stopped, after = in_sandbox(work, cfg=cfg)
    assert stopped.timed_out and stopped.text.startswith("started\n") and stopped.exit_code in (124, 137)
    assert after == tmax.Output("/var 1 kept\n", 0, False)


def test_own_exit_code_124_is_no_timeout():
    """Nor is 137: only the clock says what timed out."""
    assert shell("exit 124", "exit 137", "timeout .1 sleep 5") == [
        tmax.Output("", 124, False), tmax.Output("", 137, False), tmax.Output("", 124, False)]


def test_fork_bomb_is_survived(cfg):
    """A fork bomb ends with its timeout; the shell answers afterwards."""
    async def work(box):
        await box.run("A=1")
        await box.run("f() { f | f & }; f; sleep 20", 2)
        return await box.run("echo $A", 100)
    assert in_sandbox(work, cfg=cfg).text == "1\n"


def test_small_writes_all_arrive():
    """Three thousand writes, some of them late, from several processes: not one is missing."""
    one, two = shell("for i in {1..3000}; do echo $i; done; (sleep .3; echo late); echo end >&2",
                     "for k in 1 2 3; do (for i in {1..500}; do echo $k-$i; done) & done; wait")
    assert one.text.split() == [*map(str, range(1, 3001)), "late", "end"]
    assert sorted(two.text.split()) == sorted(f"{k}-{i}" for k in (1, 2, 3) for i in range(1, 501))


@pytest.mark.parametrize("byte", ["\\0", "\\n", " ", "%%", "\\\\", "é", "x"])
def test_the_byte_at_the_border(byte):
    """Whatever stands where the beginning ends and the end begins arrives."""
    output, = shell(f"printf '%{tmax.OUTPUT_KEPT}s{byte}%10s' '' '' | tr ' ' -; echo end")
    text = {"\\0": "\0", "\\n": "\n", " ": "-", "%%": "%", "\\\\": "\\"}.get(byte, byte)
    assert output.text == "-" * tmax.OUTPUT_KEPT + text + "-" * 10 + "end\n"


@pytest.mark.parametrize("size", [0, 1, 19_999, 20_000, 20_001, 39_999, 40_000, 40_001, 70_000, 300_000])
def test_output_of_any_size(size):
    """Complete up to twice OUTPUT_KEPT, then its beginning and its end, at every border."""
    text = "".join(f"{i:09}\n" for i in range(size // 10 + 1))[:size]
    output, = shell(f"for ((i = 0; i < {size // 10 + 1}; i++)); do printf '%09d\\n' $i; done | head -c {size}")
    if size <= 2 * tmax.OUTPUT_KEPT:
        assert len(output.text) == size and output.text == text
    else:
        first, last = text[:tmax.OUTPUT_KEPT], text[-tmax.OUTPUT_KEPT:]
        assert output.text.startswith(first) and output.text.endswith(last) and len(output.text) <= 2 * tmax.OUTPUT_KEPT + 1


def test_output_is_complete_on_a_busy_machine():
    """Many sandboxes at once: an answer waits for the output's reader, however late that gets its turn."""
    async def one():
        async with tmax.Sandbox(tmax.Task("t", Path("/nonexistent"), ""), CFG) as box:
            return [(await box.run("seq 1 3900")).text for _ in range(24)]

    async def main():
        return await asyncio.gather(*[one() for _ in range(48)])
    texts = sum(asyncio.run(main()), [])
    assert len(texts) == 48 * 24 and set(texts) == {"".join(f"{i}\n" for i in range(1, 3901))}


def test_a_gigabyte_is_capped(cfg):
    """1 GB of output: neither this process nor the sandbox keeps it; the observation has its first and last 5,000 characters."""
    Path("/proc/self/clear_refs").write_text("5")       # starts the high-water mark anew
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    output, = shell("echo BEGIN; head -c 1000000000 /dev/zero | tr '\\0' x; echo END", timeout=400, cfg=cfg)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 50_000  # KiB
    assert output.exit_code == 0 and len(output.text) <= 2 * tmax.OUTPUT_KEPT + 1
    seen = tmax.render_observation(output.text, 0)
    assert "BEGIN\n" + "x" * 4994 + "\n" in seen and "x" * 4996 + "END\n\n\n(exit_code=0)" in seen and len(seen) < 10_500


def test_background_job_with_stdout_holds_nothing_up(cfg):
    """The answer does not wait for a job that holds stdout: it comes long before the job's end."""
    outputs = shell("sleep 300 & echo one", "(while sleep 1; do echo spam; done) & echo two", "echo three", timeout=200, cfg=cfg)
    assert [o.text for o in outputs] == ["one\n", "two\n", "three\n"] and not any(o.timed_out for o in outputs)


def test_seeds_and_start_directory(tmp_path, cfg):
    """environment/seeds lies in /workspace; the shell starts in /app."""
    task = tmax.load_task(make_task(tmp_path / "t", seeds={"a b.txt": "ünï", "ü": ""}))
    assert shell("pwd; cat '/workspace/a b.txt'; ls /workspace | wc -l", task=task, cfg=cfg)[0].text == "/app\nünï2\n"


# ---------------------------------------------------------------------------------------------------------------------
# Sandbox: isolation
# ---------------------------------------------------------------------------------------------------------------------

def test_no_host_file_is_seen(tmp_path):
    """Nothing of the host's but its system folders; not even names."""
    (tmp_path / "secret").write_text("s")
    hidden = ["/etc/shadow", "/etc/passwd", "/etc/hostname", "/etc/resolv.conf", "/sys", "/run", "/mnt", "/srv", "/var/log", "/boot",
              Path(tmax.__file__), Path(tmax.__file__).parent, Path.home() / ".bashrc", Path.cwd(), tmp_path / "secret"]
    tests = "; ".join(f"[ -e '{path}' ] && echo '{path}'" for path in hidden if not str(path).startswith("/usr/"))
    names, folders, inside = shell(tests, "ls -A /root /home /opt /var /app /workspace /tmp | grep -v ':$' | tr -d '\\n'", "uname -n; ls -A /etc")
    assert names.text == "" and folders.text == ""
    assert set(inside.text.split()) <= {"sandbox", "alternatives", "ld.so.cache"}


def test_system_folders_cannot_be_written():
    """/usr, /bin, /dev and what is kernel's are read-only, and cannot be mounted anew."""
    for output in shell(*(f"echo x 2>/dev/null >{path}/x || mkdir {path}/y 2>/dev/null || rm -f /usr/bin/env 2>/dev/null || echo refused"
                          for path in ("/usr", "/usr/bin", "/bin", "/lib", "/dev", "/proc", "/etc/alternatives"))):
        assert output.text == "refused\n"
    assert Path("/usr/bin/env").exists()


def test_no_network(cfg):
    """Only an empty loopback of its own: a server on the host's cannot be reached, by TCP or by abstract socket."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"\0tmax-{uuid.uuid4()}")
        port = server.getsockname()[1]
        reach, devices = shell(f"for host in 127.0.0.1 localhost 1.1.1.1; do (exec 3<>/dev/tcp/$host/{port}) 2>/dev/null && echo reached; done; "
                               "echo tried", "tail -n +3 /proc/net/dev | cut -d: -f1; cat /proc/net/unix | grep -c '@' ", cfg=cfg)
    assert reach.text == "tried\n"
    assert devices.text.split() == ["lo", "0"]


def test_no_host_process_is_seen(cfg):
    """Process numbers are the sandbox's own: few, and none belongs to the host."""
    pids, mine = shell("echo /proc/[0-9]*", f"ls -d /proc/{os.getpid()} 2>&1; cat /proc/1/comm", cfg=cfg)
    assert len(pids.text.split()) < 10 and mine.text.endswith("bash\n")
    if os.getpid() > 1000:
        assert "No such file" in mine.text


def test_nothing_is_inherited(monkeypatch):
    """No variable and no open file of this process reaches a command."""
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    with open(__file__) as file:
        os.set_inheritable(file.fileno(), True)
        env, fds = shell("env", "for f in /proc/$$/fd/*; do readlink $f; done; readlink /proc/1/fd/* || cat /proc/1/environ")
    assert "secret-token" not in env.text and {line.split("=")[0] for line in env.text.split()} <= {
        "PATH", "HOME", "LANG", "PWD", "SHLVL", "_", "OLDPWD"}
    assert "test_" not in fds.text and "bwrap" not in fds.text and "socket" not in fds.text


def test_sandboxes_do_not_see_each_other():
    """Files and processes of one are not in the other."""
    async def other(box):
        await box.run("echo x >/tmp/mine; echo x >/app/mine; echo x >/dev/shm/mine; sleep 7777 >/dev/null 2>&1 &")
        async with tmax.Sandbox(box.task, box.cfg) as second:
            return await second.run("ls -A /tmp /app /dev/shm | grep mine; grep -l '[7]777' /proc/[0-9]*/cmdline; echo end")
    assert in_sandbox(other).text == "end\n"


def test_no_privileges():
    """Not one capability, no setuid gain, no mount, no new namespaces, no raised limit."""
    caps, = shell("grep -E '^(Cap(Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs):' /proc/self/status")
    assert re.sub(r"\s+", " ", caps.text) == " ".join(
        [*(f"{name}: 0000000000000000" for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")), "NoNewPrivs: 1 "])
    for output in shell("mount -t tmpfs none /tmp", "mount --bind /tmp /usr", "umount /proc", "mount -o remount,rw /usr", "unshare -U true",
                        "unshare -m true", "unshare -n true", "chroot / true", "mknod /tmp/d c 1 1", "ulimit -u 100000", "hostname x",
                        "cat /proc/sys/vm/swappiness >/proc/sys/vm/swappiness", "grep ' /usr [^ ]* rw' /proc/mounts"):
        assert output.exit_code != 0, output


def test_limits(cfg):
    """Open files, core dumps, size of a file, and in bubblewrap processes; what commands leave for the loop does not pile up."""
    limits, *_, left = shell("ulimit -n; ulimit -c; ulimit -f; ulimit -u", *["echo"] * 20, "ls /dev/shm/.shell/ | grep -c ^out", cfg=cfg)
    wanted = f"{tmax.MAX_OPEN}\n0\n{tmax.MAX_FILE}\n" + f"{tmax.MAX_PROCESSES}\n" * (cfg.sandbox == "bwrap")
    assert limits.text.startswith(wanted) and int(left.text) < 17


def test_an_upload_that_fails_is_lost(tmp_path, cfg):
    """The sandbox is then not what the task needs."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(tmax.SandboxLost, match="upload"):
        in_sandbox(lambda box: box.upload(tmp_path, "/proc/x"), cfg=cfg)


def test_memory_is_limited():
    """Neither files nor a single process pass the task's memory_mb."""
    task = tmax.Task("t", Path("/nonexistent"), "", memory_mb=64)
    file, process, after = shell("head -c 100000000 /dev/zero >/tmp/f", "x=$(head -c 200000000 /dev/zero | tr '\\0' x)",
                                 "rm -f /tmp/f; echo ok", task=task)
    assert file.exit_code != 0 and process.exit_code != 0 and after.text == "ok\n"


def test_isolation_of_containers(cfg, tmp_path):
    """From inside: no file of the host, no engine, no way to get more rights; containers of a public network reach each other not."""
    if cfg.sandbox != "docker":
        pytest.skip("bubblewrap has tests of its own above")
    (tmp_path / "secret").write_text("s")
    public = dataclasses.replace(cfg, network="public")

    async def work(box):
        refused = [await box.run(command) for command in (
            "mount -t tmpfs none /tmp", "mount --bind /tmp /usr", "umount /proc", "unshare -Ur true", "unshare -m true", "mknod /tmp/d b 7 0",
            "hostname x", "echo 1 >/proc/sys/kernel/panic", "echo b >/proc/sysrq-trigger", f"[ -e '{tmp_path}' ]", f"[ -e '{tmax.__file__}' ]",
            "[ -e /var/run/docker.sock ] || [ -e /run/docker.sock ]", "exec 3<>/dev/tcp/1.1.1.1/80")]
        assert [output.exit_code == 0 for output in refused] == [False] * len(refused), refused
        caps = await box.run("grep -E '^(CapEff|CapBnd|NoNewPrivs):' /proc/self/status; id -u worker; chown worker /tmp; setpriv --reuid worker --clear-groups id -u")
        assert caps.text.split()[1::2][:3] == ["00000000000404fb", "00000000000404fb", "1"] and caps.text.endswith("1000\n1000\n")
    in_sandbox(work, cfg=cfg)

    async def neighbour(box):
        await box.run("python3 -m http.server 8000 >/dev/null 2>&1 & until (: <>/dev/tcp/127.0.0.1/8000) 2>/dev/null; do sleep .1; done")
        box.container.reload()
        address = box.container.attrs["NetworkSettings"]["Networks"]["tmax"]["IPAddress"]
        async with tmax.Sandbox(tmax.Task("t", Path("/nonexistent"), ""), public) as other:
            return (await other.run(f"timeout 3 bash -c 'exec 3<>/dev/tcp/{address}/8000'; echo $?; tail -n +3 /proc/net/dev | wc -l")).text
    if tmax.docker_client().info()["BridgeNfIptables"]:
        try:
            assert in_sandbox(neighbour, cfg=public) == "124\n2\n"
        except tmax.SandboxLost:
            pytest.skip("this engine has no bridge network")


@pytest.mark.parametrize("user", ["worker", "1000"])
def test_a_task_names_its_user(tmp_path, cfg, user):
    """[agent] user, a name or a number: the agent works as that user, at home there; files of root are not its to write; the tests run as root."""
    if cfg.sandbox == "bwrap":
        pytest.skip("a sandbox of bubblewrap has one user")
    task = dataclasses.replace(tmax.load_task(make_task(tmp_path / "t", test=f"id -u; rm /usr/bin/nproc && echo 1 >{TXT}")), user=user)

    async def work(box):
        text = (await box.run("id -un; echo $HOME; touch ~/mine; rm -f /usr/bin/nproc; A=1; grep CapEff /proc/self/status")).text
        return text + (await box.run("echo $A; ls ~")).text, await box.grade()
    text, reward = in_sandbox(work, task=task, cfg=cfg)
    assert text.startswith("worker\n/home/worker\nrm:") and text.endswith("CapEff:\t0000000000000000\n1\nmine\n") and reward == 1


# ---------------------------------------------------------------------------------------------------------------------
# Sandbox: its end
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def alive(monkeypatch):
    """A function that counts the processes of this test's sandboxes, up to 20 s until none is left. Their command lines are marked."""
    mark = f"mark-{uuid.uuid4()}"
    for name in ("SHELL_LOOP", "SHELL_COMMAND"):
        monkeypatch.setattr(tmax, name, f"{getattr(tmax, name)}\n# {mark}\n")

    def count(wait=True):
        end = time.monotonic() + 20
        while True:
            found = 0
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    found += mark.encode() in path.read_bytes()
                except OSError:
                    continue
            if not (found and wait and time.monotonic() < end):
                return found
            time.sleep(0.05)
    count.mark = mark
    return count


def our_containers():
    """Containers of this process in the engine."""
    containers = tmax.docker_client().containers.list(all=True, filters={"label": "tmax.owner"}, ignore_removed=True)
    return [c for c in containers if c.labels["tmax.owner"] == tmax.process_mark(os.getpid())]


@pytest.mark.parametrize("how", ["return", "exception", "cancelled"])
def test_no_process_is_left(alive, how, cfg):
    """However `async with` ends, in the middle of a command too, background jobs, TERM-proof ones and all else are gone."""
    async def main():
        async with tmax.Sandbox(tmax.Task("t", Path("/nonexistent"), ""), cfg) as box:
            await box.run(f"(trap '' TERM HUP; exec setsid bash -c 'exec -a {alive.mark} sleep 7777') >/dev/null 2>&1 &\n"
                          f"until grep -q '^{alive.mark}' /proc/$!/cmdline; do sleep .05; done")
            assert alive(wait=False) >= 2
            if how == "exception":
                raise KeyError
            if how == "cancelled":
                asyncio.get_running_loop().call_later(1, asyncio.current_task().cancel)
                await box.run("trap '' TERM; while :; do sleep 1; done")
    if how == "return":
        asyncio.run(main())
    else:
        with pytest.raises(KeyError if how == "exception" else asyncio.CancelledError):
            asyncio.run(main())
    assert alive() == 0
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPool"):
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.parametrize("delay", [0, 0.003, 0.01, 0.03, 0.1, 0.4])
def test_cancelled_start_leaves_no_process(alive, delay, cfg):
    """Cancelled at any point of its start."""
    async def main():
        async def hold():
            async with tmax.Sandbox(tmax.Task("t", Path("/nonexistent"), ""), cfg):
                await asyncio.sleep(100)
        tasks = [asyncio.create_task(hold()) for _ in range(3)]
        await asyncio.sleep(delay)
        for task in tasks:
            task.cancel()
        assert all(isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*tasks, return_exceptions=True))
    asyncio.run(main())
    assert alive() == 0 and (cfg.sandbox == "bwrap" or wait_for(lambda: not our_containers(), 20) is None)


def kill_from_outside(box):
    """As somebody else would: the sandbox's own functions are not asked."""
    box.process.kill() if box.process else tmax.docker_client().api.kill(box.container.id)


@pytest.mark.parametrize("busy", [False, True])
def test_killed_from_outside_is_lost(alive, busy, cfg):
    """SandboxLost at once if it is killed during a command, at the next command else; nothing is started in its place."""
    async def work(box):
        if busy:
            asyncio.get_running_loop().call_later(1, kill_from_outside, box)
            await box.run("sleep 7777", 300)
        kill_from_outside(box)
        await box.run("echo still here")
    with pytest.raises(tmax.SandboxLost, match="died"):
        in_sandbox(work, cfg=cfg)
    assert alive() == 0


@pytest.mark.parametrize("command, memory, reason", [
    ("kill -STOP $PPID", 512, "silent"), ("head -c 99M /dev/zero >/dev/shm/f; sleep 1; echo", 40, "out of memory"),
    ("head -c 200000 /dev/zero >/tmp/f; (while :; do for o in /dev/shm/.shell/out.*; do ln -sf /tmp/f $o; done; done) >/dev/null 2>&1 & sleep 1",
     512, "meddled"),
    ("printf '#!/bin/sh\\necho a b c\\n' >$(type -p base64); sleep 1", 512, "meddled"),
], ids=["stopped", "memory", "answer", "program"])
def test_an_agent_that_ends_its_own_sandbox(tmp_path, tokenizers, monkeypatch, cfg, command, memory, reason):
    """Finish killed_itself, reward 0, and not void: a rollout cannot get out of its group."""
    if cfg.sandbox == "bwrap" and (reason == "out of memory" or "base64" in command):
        pytest.skip("its loop has memory of its own, and its programs are read-only")
    monkeypatch.setattr(tmax, "GRACE", 3)
    task = dataclasses.replace(tmax.load_task(make_task(tmp_path / "t")), memory_mb=memory)
    script = Script(tokenizers["tiny"], *[hermes(command)] * 9)
    r = asyncio.run(tmax.rollout(script, task, tokenizers["tiny"], dataclasses.replace(cfg, bash_timeout=4.0, max_total_tokens=4096)))
    assert (r.finish, r.reward, r.void) == ("killed_itself", 0.0, False) and reason in r.transcript[-1]["content"]


def hold_containers(cfg):
    """Body of a process that has four containers at work, until it is killed."""
    tmax.docker_client.cache_clear()

    async def one():
        async with tmax.Sandbox(tmax.Task("t", Path("/nonexistent"), ""), cfg) as box:
            await box.run("sleep 7777", 9999)

    async def main():
        await asyncio.gather(*[one() for _ in range(4)])
    asyncio.run(main())


@pytest.mark.parametrize("moment", [0.05, 0.5, 2.5, *(pytest.param(random.Random(i).uniform(0, 3), marks=pytest.mark.slow) for i in range(20))])
def test_killed_owner_leaves_no_container(image, moment):
    """SIGKILL of the process that owns containers: the next start removes them, and nothing of others."""
    client, cfg = tmax.docker_client(), dataclasses.replace(CFG, sandbox="docker", image=image, network="none", name=f"leak-{uuid.uuid4()}")
    left = lambda: client.containers.list(all=True, filters={"label": f"tmax.run={cfg.name}"}, ignore_removed=True)
    mounts = lambda: [line for line in Path("/proc/mounts").read_text().splitlines() if client.info()["DockerRootDir"] in line]
    before = mounts()
    others = [client.containers.create(image, "true", labels=labels) for labels in ({}, {"tmax.owner": tmax.process_mark(os.getpid())}, {
        "tmax.owner": "another-machine pid:[1] 1 1"})]
    try:
        owner = multiprocessing.get_context("fork").Process(target=hold_containers, args=(cfg,))
        owner.start()
        time.sleep(moment)
        if moment == 2.5:
            wait_for(left, 60)
        owner.kill()
        owner.join()
        wait_for(lambda: tmax.remove_containers() or not left(), 30)    # a container may be in the making
        assert all(client.containers.get(c.id) for c in others)
    finally:
        for container in others:
            container.remove(force=True)
    wait_for(lambda: mounts() == before, 30)


@pytest.mark.parametrize("moment", [0.3, *(pytest.param(random.Random(i).uniform(0, 2), marks=pytest.mark.slow) for i in range(6))])
def test_a_killed_engine_is_waited_for(image, moment, capfd):
    """SIGKILL of the engine: its containers are lost (void); new ones start as soon as it is back, with a message each time."""
    folder = Path(os.environ.get("DOCKER_HOST", "").removeprefix("unix://")).parent
    if not (folder / "docker.pid").exists():
        pytest.skip("the engine is not .ci/run's own")
    cfg, task = dataclasses.replace(CFG, sandbox="docker", image=image, network="none"), tmax.Task("t", Path("/nonexistent"), "")

    async def later():
        async with tmax.Sandbox(task, cfg) as box:
            return (await box.run("echo $((6 * 7))")).text

    async def main():
        with pytest.raises(tmax.SandboxLost):
            async with tmax.Sandbox(task, cfg) as box:
                asyncio.get_running_loop().call_later(moment, os.kill, int((folder / "docker.pid").read_text()), signal.SIGKILL)
                await box.run("sleep 7777")
        waiting = [asyncio.create_task(later()) for _ in range(3)]
        await asyncio.sleep(1.5)
        assert not any(task.done() for task in waiting)
        await asyncio.to_thread(subprocess.run, ["bash", Path(tmax.__file__).parent / ".ci/run", "engine", folder], check=True)
        return await asyncio.gather(*waiting)
    tmax.Sandbox.said.clear()
    assert asyncio.run(main()) == ["42\n"] * 3
    said = capfd.readouterr().err
    assert said.count("engine: it does not answer") == said.count("engine: it answers again") == 1, said
    wait_for(lambda: tmax.remove_containers(owned_by_me=True) or not our_containers(), 30)


def test_no_bubblewrap_is_one_line(monkeypatch):
    """Where no sandbox can be made, check_sandbox says so before anything expensive happens."""
    monkeypatch.setattr(tmax, "bwrap_path", lambda: "/usr/bin/false")
    with pytest.raises(tmax.UserError, match="--sandbox") as error:
        tmax.check_sandbox(CFG)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(tmax, "bwrap_path", lambda: "/nonexistent/bwrap")
    with pytest.raises(tmax.UserError, match="--sandbox"):
        tmax.check_sandbox(CFG)


# ---------------------------------------------------------------------------------------------------------------------
# Sandbox: grading
# ---------------------------------------------------------------------------------------------------------------------

def graded(folder, test, *commands, toml=None, cfg=CFG):
    """Reward and verifier's words after the agent's commands, by a task with this tests/test.sh."""
    async def work(box):
        for command in commands:
            await box.run(command)
        return await box.grade(), box.grading
    return in_sandbox(work, task=tmax.load_task(make_task(folder, test=test, toml=toml)), cfg=cfg)


TXT, JSON = "/logs/verifier/reward.txt", "/logs/verifier/reward.json"


@pytest.mark.parametrize("test, reward", [
    (f"echo 1 >{TXT}", 1), (f"printf 0.25 >{TXT}", 0.25), (f"echo ' 0.5 ' >{TXT}", 0.5), (f"echo .5 >{TXT}", 0.5), (f"echo 0 >{TXT}", 0),
    (f"echo 7.5 >{TXT}", 1), (f"echo -1 >{TXT}", 0), (f"echo NaN >{TXT}", 0), (f"echo nan >{TXT}", 0), (f"echo yes >{TXT}", 0),
    (f": >{TXT}", 0), (f"echo 1 1 >{TXT}", 0), (f"printf '\\xff' >{TXT}", 0), (f"echo 1{'0' * 400} >{TXT}", 1),
    (f"head -c 30000 /dev/zero | tr '\\0' '[' >{TXT}", 0), ("true", 0), ("echo 1", 0), (f"echo {MARKER}; echo 1", 0),
    (f"echo '{{\"reward\": 0.75}}' >{JSON}", 0.75), (f"echo '{{\"reward\": \"x\"}}' >{JSON}", 0), (f"echo '{{\"score\": 1}}' >{JSON}", 0),
    (f"echo '{{\"reward\": null}}' >{JSON}", 0), (f"echo 1 >{TXT}; exit 3", 1), (f"sleep 99 & echo 1 >{TXT}; kill $!; wait $!", 1), (f"echo 1 >{TXT}; kill -9 $$", 0),
    (f"set -e; cd \"$(dirname \"$0\")\"; [ $PWD = /tests ]; echo 1 >{TXT}", 1), (f"exec >/dev/null 2>&1; echo 1 >{TXT}", 1),
    (f"sleep 300 & head -c 90000 /dev/zero | tr '\\0' x; echo 1 >{TXT}", 1),
], ids=lambda value: str(value)[:50])
def test_reward_is_what_the_tests_wrote(tmp_path, test, reward):
    """reward.txt or reward.json, clipped to [0, 1]; anything else, and tests that were killed, is 0. What they print or exit with does not matter."""
    assert graded(tmp_path / "t", test)[0] == reward


@pytest.mark.parametrize("test", ["sleep 300", "echo 1; sleep 300", f"echo 1 >{TXT}; sleep 300", f"echo {MARKER}; echo 1; sleep 300"])
def test_verifier_timeout_is_zero(tmp_path, test):
    """The task's own limit for tests, whatever they printed or wrote before."""
    assert graded(tmp_path / "t", test, toml="[verifier]\ntimeout_sec = 2\n")[0] == 0


def test_tests_start_in_app(tmp_path, cfg):
    """Also if the agent made it anew."""
    assert graded(tmp_path / "t", f"[ -e done ] && echo 1 >{TXT}", "cd / && rm -rf /app && mkdir /app && touch /app/done", cfg=cfg)[0] == 1


def test_verifier_sees_its_environment(tmp_path):
    """[verifier.env] reaches the tests as it is written, and not the agent."""
    toml = '[verifier.env]\nKEY = "a  \'b\' $HOME \\"q\\""\nN = 3\n'
    test = f"""printf '%s|%s' "$KEY" "$N"; [ ! -e /tmp/seen ] && echo 1 >{TXT}"""
    reward, words = graded(tmp_path / "t", test, 'if [ -n "$KEY$N" ]; then touch /tmp/seen; fi', toml=toml)
    assert reward == 1 and """a  'b' $HOME "q"|3""" in words


@pytest.mark.parametrize("commands", [
    [f"mkdir -p /logs/verifier; echo 1 >{TXT}; echo '{{\"reward\": 1}}' >{JSON}"],
    ["mkdir -p /tmp/l; ln -s /tmp/l /logs; mkdir /logs/verifier; echo 1 >/logs/verifier/reward.txt"],
    ["mkdir -p /logs /tmp/l; echo 1 >/tmp/l/reward.txt; ln -s /tmp/l /logs/verifier"],
    ["mkdir -p /tmp/t; ln -s /tmp/t /tests; echo 'echo 1 >/logs/verifier/reward.txt' >/tmp/t/test.sh"],
    ["mkdir /tests; echo 'echo 1 >/logs/verifier/reward.txt' >/tests/test.sh; touch /tests/extra"],
    ["bash() { mkdir -p /logs/verifier; echo 1 >/logs/verifier/reward.txt; }; export -f bash; cat() { echo 1; }; export -f cat"],
    ["mkdir /tmp/bin; printf '#!/bin/sh\\necho 1' >/tmp/bin/cat; cp /tmp/bin/cat /tmp/bin/bash; chmod +x /tmp/bin/*; export PATH=/tmp/bin:$PATH"],
    ["echo 'echo 1 >/logs/verifier/reward.txt; exit' >/tmp/e; export BASH_ENV=/tmp/e ENV=/tmp/e"],
    ["trap 'echo 1' EXIT DEBUG ERR; alias cat='echo 1'; shopt -s expand_aliases; set -e"],
    ["exec() { echo 1; }; eval() { echo 1; }; export -f exec eval; readonly __state=1 __code=0"],
    [": >/logs; : >/tests"],
], ids=["pre-written", "/logs linked", "/logs/verifier linked", "/tests linked", "own /tests", "functions", "PATH", "BASH_ENV", "traps", "builtins", "files"])
def test_agent_does_not_reach_the_tests(tmp_path, commands, cfg):
    """Tests that give 0 still give 0, and find real folders and only their own files, whatever the agent left behind."""
    reward, words = graded(tmp_path / "t", "[ -L /logs ] || [ ! -d /logs/verifier ] || ls -A /tests; echo $BASH_ENV; type cat; echo ran", *commands, cfg=cfg)
    assert reward == 0 and words.startswith("test.sh\n\ncat is /usr/bin/cat\nran\n"), words


def test_tests_are_hidden_before_grading(tmp_path, cfg):
    """No /tests and no test.sh before grading; what the agent did, its files and its services, is there for the tests; the rest
    of what it left running is not."""
    test = (f"[ -e /tmp/clean ] && [ -e /app/done ] && ! kill -0 $(cat /tmp/pid) && exec 3<>/dev/tcp/127.0.0.1/8000 && printf 'GET /done HTTP/1.0\\n\\n' >&3 "
            f"&& grep 'it works' <&3 && echo 1 >{TXT}")
    assert graded(tmp_path / "t", test, "[ ! -e /tests ] && [ -z \"$(find / -xdev -name test.sh 2>/dev/null)\" ] && touch /tmp/clean",
                  "echo it works >/app/done; sleep 7777 >/dev/null 2>&1 & echo $! >/tmp/pid",
                  "python3 -m http.server 8000 & until (: <>/dev/tcp/127.0.0.1/8000) 2>/dev/null; do sleep .1; done", toml="[verifier]\ntimeout_sec = 20\n", cfg=cfg)[0] == 1


@pytest.mark.bench
def test_benchmark_sandboxes(cfg, capsys):
    """Sandboxes started and closed per second, commands per second over 16 of them, latency of one; beside `docker exec`."""
    task = tmax.Task("t", Path("/nonexistent"), "")

    async def timed(work, times):
        start = time.monotonic()
        await asyncio.gather(*[work(i) for i in range(times)])
        return time.monotonic() - start

    async def start_and_close(_):
        async with tmax.Sandbox(task, cfg):
            pass

    async def main():
        started = 32 / await timed(start_and_close, 32)
        async with contextlib.AsyncExitStack() as stack:
            boxes = await asyncio.gather(*[stack.enter_async_context(tmax.Sandbox(task, cfg)) for _ in range(16)])

            async def ours(box):
                assert (await box.run("echo x")).text == "x\n"

            async def execs(box):
                await asyncio.to_thread(box.container.exec_run, ["bash", "-c", "echo x"])
            rows = {}
            for name, run in {"this loop": ours, "docker exec": execs}.items():
                if name == "this loop" or cfg.sandbox == "docker":
                    async def one_after_another(box, times=10):
                        for _ in range(times):
                            await run(box)
                    rows[name] = await timed(lambda i: one_after_another(boxes[0]), 1) / 10, 160 / await timed(
                        lambda i: one_after_another(boxes[i]), 16)
        return started, rows
    started, rows = asyncio.run(main())
    with capsys.disabled():
        print(f"\n{cfg.sandbox}, {os.cpu_count()} cores: {started:.1f} sandboxes started and closed per second")
        for name, (latency, rate) in rows.items():
            print(f"  {name:12} {1000 * latency:6.0f} ms a command   {rate:6.1f} commands/s over 16 sandboxes")


# ---------------------------------------------------------------------------------------------------------------------
# Sandbox: cheats
# ---------------------------------------------------------------------------------------------------------------------

# A service (it holds a socket) that runs Python every 2 ms: it survives into grading.
SERVICE = """cat >/tmp/service.py <<'X'
import ctypes, os, signal, socket, time
s = socket.create_server(("127.0.0.1", 8000))
P, R = "/proc", "/logs/verifier/reward.txt"
pids = lambda: [int(p) for p in os.listdir(P) if p.isdigit() and int(p) != os.getpid()]
def write(path, text="1"):
    with open(path, "w") as f: f.write(text)
while True:
    time.sleep(.002)
    try:
        %s
    except OSError: pass
X
python3 /tmp/service.py >/dev/null 2>&1 & until (: <>/dev/tcp/127.0.0.1/8000) 2>/dev/null; do sleep .05; done"""
SLOW = f"sleep .3; [ -e /app/done ]; echo $((1 - $?)) >{TXT}; sleep .3"      # honest tests: 1 if the work is done


@pytest.mark.parametrize("command, done, reward, tampered", [
    (f"(while :; do mkdir -p /logs/verifier; echo 1 >{TXT}; done) >/dev/null 2>&1 &", False, 0, False),
    ("""cat >/tmp/hop.py <<'X'
import os
while True:
    if os.fork(): os._exit(0)
    try: open("/logs/verifier/reward.txt", "w").write("1")
    except OSError: pass
X
python3 /tmp/hop.py >/dev/null 2>&1 &""", False, 0, None),      # a new process every millisecond: none is there when it is looked at
    ("(until cat /tests/test.sh; do :; done) >/tmp/seen 2>/dev/null & touch /app/done", True, 1, False),
    ("touch /app/done; (while :; do for p in /proc/[0-9]*; do [ ${p#/proc/} = $BASHPID ] || kill -9 ${p#/proc/}; done; done) >/dev/null 2>&1 &",
     True, 1, False),
    ("head -c 999M /dev/zero >/dev/shm/f; touch /app/done", True, 1, False),
    ("rm -rf /dev/shm/.shell; mkdir /dev/shm/.shell; for n in {1..99}; do ln -s /proc/1/fd/1 /dev/shm/.shell/out.$n; done; printf '0 MQ== 1\\n'",
     False, 0, False),
    ("rm -rf /dev/shm/.shell; ln -s /proc/1/fd /dev/shm/.shell; echo 1", False, 0, False),
    ("mkdir -p /tmp/py; echo 'open(\"/logs/verifier/reward.txt\", \"w\").write(\"1\")' >/tmp/py/sitecustomize.py; export PYTHONPATH=/tmp/py",
     False, 0, False),
    ("echo '0 MQ== 1'; echo 1; echo tampered", False, 0, False),
    (SERVICE % "write(R)", False, 0, None),         # tampered, if it comes before the links are there
    (SERVICE % "write('/tmp/r'); os.rename('/tmp/r', R)", False, 0, True),
    (SERVICE % "os.unlink(R); os.symlink('/tmp/r', R); write('/tmp/r')", False, 0, True),
    (SERVICE % "[write(f'{P}/1/fd/{n}') for n in (5, 6)]", False, 0, False),
    (SERVICE % "write(f'{P}/1/fd/1', '0 MQ== 1\\n')", False, 0, False),
    (SERVICE % "[write(f'{P}/{p}/fd/1') for p in pids()]", False, 0, False),
    (SERVICE % "[write(f'{P}/{p}/root/{R}') for p in pids()]", False, 0, False),
    (SERVICE % "[ctypes.CDLL(None).syscall(438, os.pidfd_open(p), n, 0) >= 0 and os.write(n, b'1') for p in pids() for n in (3, 5)]", False, 0, False),
    (SERVICE % "[os.kill(p, signal.SIGKILL) for p in pids() if p > 1]", False, 0, False),
    (SERVICE % "s.accept()" + "; touch /app/done", True, 1, False),
], ids="""writer hopper reader killer full links folder sitecustomize printed service-writes service-renames service-links service-files
    service-answers service-others service-root service-descriptors service-kills service-honest""".split())
def test_cheats(tmp_path, cfg, command, done, reward, tampered):
    """What else the agent tries ends with the reward that its work deserves, or with `tampered`."""
    async def work(box):
        await box.run(command)
        return await box.grade(), box.tampered, box.grading
    test = f"[ ! -s /tmp/seen ] || exit 1\n{'python3 -c 1;' * ('sitecustomize' in command)} {SLOW}"
    task = tmax.load_task(make_task(tmp_path / "t", test=test))
    got = in_sandbox(work, task=dataclasses.replace(task, memory_mb=1024), cfg=cfg)
    assert got[0] == reward and tampered in (got[1], None), got


@pytest.mark.parametrize("command", [
    "printf '#!/bin/sh\\necho 1 >/logs/verifier/reward.txt; exec sleep 9' >/tmp/python3; chmod +x /tmp/python3; mv /tmp/python3 $(type -p python3)",
    SERVICE % "write('/tests/test.sh', f'echo 1 >{R}')",
], ids=["replaced program", "rewritten tests"])
def test_what_one_container_cannot_keep_apart(tmp_path, image, command):
    """Measured, and in the README: root in a container can replace programs that the tests call, a service can rewrite the tests."""
    cfg = dataclasses.replace(CFG, sandbox="docker", image=image, network="none")
    assert graded(tmp_path / "t", "sleep 1\ntimeout 1 python3 -c 1", command, cfg=cfg)[0] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts: a script in the model's place
# ---------------------------------------------------------------------------------------------------------------------

class Script:
    """An engine that says given texts, spelt letter by letter, as no tokenizer would: re-tokenising would show."""

    def __init__(self, tokenizer, *says):
        self.tokenizer, self.says, self.calls, self.sampled = tokenizer, list(says), [], []

    async def generate(self, tokens, budget, stop_ids, engine_rank=0, cfg=None):
        self.cfg = cfg
        self.calls.append((list(tokens), budget, list(stop_ids), engine_rank))
        said = self.says.pop(0)
        if callable(said):
            said = said()
        ids = [i for part in re.split(r"(<\|?/?\w+\|?>)", said) for piece in ([part] if part.startswith("<") else part)
               for i in self.tokenizer.encode(piece, add_special_tokens=False)] + [self.tokenizer.eos_token_id]
        cut = len(ids) > budget
        ids = ids[:budget]
        n = sum(map(len, self.sampled))
        self.sampled.append(ids)
        return tmax.Turn(ids, [-0.25 * (n + i + 1) for i in range(len(ids))], [(n + i) // 7 for i in range(len(ids))], cut)


def rolled_out(folder, tokenizer, *says, test=f"[ -e /tmp/done ] && echo 1 >{TXT}", toml=None, rank=0, **cfg):
    """A Rollout of the script in a real sandbox, checked for what holds of each; and the Script."""
    task = tmax.load_task(make_task(folder / "t", test=test, toml=toml))
    engine = Script(tokenizer, *says)
    cfg = dataclasses.replace(CFG, **cfg)
    r = asyncio.run(tmax.rollout(engine, task, tokenizer, cfg, rank))
    assert len(r.tokens) == len(r.mask) == len(r.logprobs) == len(r.versions) <= r.prompt_tokens + cfg.max_total_tokens
    sampled = sum(engine.sampled, [])
    assert [t for t, m in zip(r.tokens, r.mask) if m] == sampled and set(r.mask) <= {0, 1}
    assert [x for x, m in zip(r.logprobs, r.mask) if m] == [-0.25 * (i + 1) for i in range(len(sampled))]
    assert [x for x, m in zip(r.versions, r.mask) if m] == [i // 7 for i in range(len(sampled))]
    assert all(lp == 0.0 and v == -1 for lp, v, m in zip(r.logprobs, r.versions, r.mask) if not m)
    prompt = tmax.ChatFormat(tokenizer).prompt(task.instruction)
    assert r.tokens[:r.prompt_tokens] == prompt == engine.calls[0][0] and not any(r.mask[:r.prompt_tokens])
    end = 0
    for (seen, budget, stop, at), ids in zip(engine.calls, engine.sampled):
        assert r.tokens[:len(seen)] == seen and r.tokens[len(seen):len(seen) + len(ids)] == ids
        assert budget == min(cfg.max_turn_tokens, cfg.max_total_tokens - (len(seen) - r.prompt_tokens)) >= 1
        assert stop == [tokenizer.eos_token_id] and at == rank and len(seen) > end
        end = len(seen) + len(ids)
    assert engine.cfg == cfg    # and so the sampling parameters are the rollout's own
    assert r.task == "t" and r.void == r.finish.startswith("void") and r.advantage == 0
    return r, engine


@pytest.fixture(params=["tiny", "llama"])
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


def test_rollout_that_submits(tmp_path, tokenizer):
    """Two turns and a submission: the reward is the tests'; the transcript tells what happened."""
    r, engine = rolled_out(tmp_path, tokenizer, "First.\n" + hermes("cd /tmp; echo hello"), xml("touch done; exit 3"), hermes(SUBMIT), rank=2)
    assert (r.finish, r.reward, r.steps, len(engine.calls)) == ("submitted", 1.0, 3, 3)
    assert [m["role"] for m in r.transcript] == ["assistant", "tool", "assistant", "tool", "assistant", "verifier"]
    assert r.transcript[0]["content"] == "First.\n" + hermes("cd /tmp; echo hello")
    assert [m["content"] for m in r.transcript if m["role"] == "tool"] == ["hello\n\n\n(exit_code=0)", "(no output)\n\n(exit_code=3)"]
    assert r.mask[-1] == 1 and r.tokens[-1] == tokenizer.eos_token_id and r.seconds_bash > 0
    text = tokenizer.decode(r.tokens, skip_special_tokens=False)
    conversation = [{"role": "system", "content": tmax.SYSTEM_PROMPT}, {"role": "user", "content": "Do it."},
                    *({"role": m["role"], "content": m["content"]} for m in r.transcript[:-1])]
    assert tokenizer.apply_chat_template(conversation, tools=[tmax.BASH_TOOL], tokenize=False).rstrip("\n") == text


def test_submission_without_the_work_is_zero(tmp_path, tokenizers):
    """Submitted, tests run, nothing done: reward 0, not void."""
    r, _ = rolled_out(tmp_path, tokenizers["tiny"], hermes(SUBMIT))
    assert (r.finish, r.reward, r.steps, r.void) == ("submitted", 0.0, 1, False)


def test_several_calls_in_one_turn(tmp_path, tokenizer):
    """They run in order, each counts as a step, and one assistant header follows the last observation."""
    r, engine = rolled_out(tmp_path, tokenizer, hermes("echo 1 >/tmp/done") + "\n" + xml("cat /tmp/done") + hermes("pwd"), hermes(SUBMIT))
    assert (r.finish, r.reward, r.steps, len(engine.calls)) == ("submitted", 1.0, 4, 2)
    between = engine.calls[1][0][r.prompt_tokens + len(engine.sampled[0]):]
    outputs = ["(no output)\n\n(exit_code=0)", "1\n\n\n(exit_code=0)", "/app\n\n\n(exit_code=0)"]
    assert between == tmax.ChatFormat(tokenizer).tool_turn(outputs)
    assert tokenizer.decode(between).count("assistant") == 1


def test_calls_before_a_submission_in_the_same_turn_run(tmp_path, tokenizers):
    """A turn that works and then submits; what stands after the submission does not run."""
    test = f"[ -e /tmp/done ] && [ ! -e /tmp/late ] && echo 1 >{TXT}"
    r, _ = rolled_out(tmp_path, tokenizers["tiny"], hermes("touch /tmp/done") + hermes(SUBMIT) + hermes("touch /tmp/late"), test=test)
    assert (r.finish, r.reward, r.steps) == ("submitted", 1.0, 2)


@pytest.mark.parametrize("last", ["I am done.", "", "<tool_call>{oops</tool_call>", hermes("ls") + "<tool_call>", hermes("ls").replace("bash", "sh"),
                                  MARKER, SUBMIT])
def test_a_turn_without_a_valid_call_ends_it(tmp_path, tokenizers, last):
    """no_call: reward 0, tests not run, the turn stays in the batch."""
    r, engine = rolled_out(tmp_path, tokenizers["tiny"], hermes("touch /tmp/done"), last)
    assert (r.finish, r.reward, r.steps) == ("no_call", 0.0, 1)
    assert "verifier" not in [m["role"] for m in r.transcript] and r.tokens[-len(engine.sampled[1]):] == engine.sampled[1]


@pytest.mark.parametrize("command", [f"echo '{SUBMIT}' >/tmp/p; cat /tmp/p", f"{SUBMIT}; true", f"printf {MARKER}", f"echo {MARKER} x"])
def test_marker_in_an_output_does_not_submit(tmp_path, tokenizers, command):
    """A command that prints the marker is a command like any other."""
    r, engine = rolled_out(tmp_path, tokenizers["tiny"], hermes(command), "stop")
    assert (r.finish, len(engine.calls)) == ("no_call", 2) and MARKER in r.transcript[1]["content"]


@pytest.mark.parametrize("says, steps, finish", [
    ([hermes("touch /tmp/done")] * 3, 3, "max_steps"), ([hermes("true") * 5], 3, "max_steps"), ([hermes("true")] * 2 + [hermes(SUBMIT)], 3, "submitted"),
])
def test_steps_run_out(tmp_path, tokenizers, says, steps, finish):
    """max_steps counts calls, not turns, and the last one may submit; else the tests do not run."""
    r, _ = rolled_out(tmp_path, tokenizers["tiny"], *says, max_steps=3)
    assert (r.finish, r.reward, r.steps) == (finish, 0.0, steps)
    assert ("verifier" in [m["role"] for m in r.transcript]) == (finish == "submitted")


@pytest.mark.parametrize("limits", [dict(max_turn_tokens=20), dict(max_total_tokens=20)], ids=str)
def test_a_cut_turn_ends_it(tmp_path, tokenizers, limits):
    """max_tokens, although what was said until then holds a whole call; all sampled tokens stay."""
    r, engine = rolled_out(tmp_path, tokenizers["tiny"], hermes("ls") + "x" * 300, **limits)
    assert (r.finish, r.reward, r.steps, sum(r.mask)) == ("max_tokens", 0.0, 0, 20)


def test_an_observation_must_fit(tmp_path, tokenizers):
    """It fits if one more token can be sampled after it; else the rollout ends without it."""
    tokenizer, command = tokenizers["tiny"], hermes("echo hello")
    chat = tmax.ChatFormat(tokenizer)
    turn = len(rolled_out(tmp_path / "a", tokenizer, command, "")[1].sampled[0])
    full = turn + len(chat.tool_turn(["hello\n\n\n(exit_code=0)"]))
    r, engine = rolled_out(tmp_path / "b", tokenizer, command, max_total_tokens=full)
    assert (r.finish, r.reward, len(r.tokens) - r.prompt_tokens) == ("max_tokens", 0.0, turn)
    r, engine = rolled_out(tmp_path / "c", tokenizer, command, "too long", max_total_tokens=full + 1)
    assert (r.finish, engine.calls[1][1], len(r.tokens) - r.prompt_tokens) == ("max_tokens", 1, full + 1)


def test_a_slow_command_is_stopped_and_said(tmp_path, tokenizers):
    """bash_timeout ends a command, not the rollout; the model sees what came and that it was stopped."""
    r, _ = rolled_out(tmp_path, tokenizers["tiny"], hermes("echo before; sleep 300"), "end", bash_timeout=2.0)
    assert r.finish == "no_call" and re.fullmatch(r"before\n\n\(stopped after 2 s\)\n\n\(exit_code=(124|137)\)", r.transcript[1]["content"])


def test_the_agents_time_runs_out(tmp_path, tokenizers):
    """[agent] timeout_sec bounds the commands of a rollout together."""
    r, engine = rolled_out(tmp_path, tokenizers["tiny"], hermes("touch /tmp/done"), hermes("sleep 300"), hermes(SUBMIT),
                           toml="[agent]\ntimeout_sec = 4\n")
    assert r.finish == "timeout" and r.steps == 2 and len(engine.calls) == 2


@pytest.mark.parametrize("when", ["before a command", "before grading"])
def test_a_lost_sandbox_voids_the_rollout(tmp_path, tokenizers, monkeypatch, when):
    """void:REASON, not a reward of 0, and no second sandbox in its place."""
    boxes = []

    class Recorded(tmax.Sandbox):
        def __init__(self, *args):
            super().__init__(*args)
            boxes.append(self)
    monkeypatch.setattr(tmax, "Sandbox", Recorded)

    def kill():
        kill_from_outside(boxes[0])
        boxes[0].process.wait()
        return hermes("ls" if when == "before a command" else SUBMIT)
    r, _ = rolled_out(tmp_path, tokenizers["tiny"], hermes("touch /tmp/done"), kill)
    assert r.void and re.fullmatch("void:.+", r.finish) and r.reward == 0 and len(boxes) == 1


def test_tests_that_are_gone_void_the_rollout(tmp_path, tokenizers):
    """They were there when the task was loaded: a fault of this machine, not of the model, and not the end of the run."""
    gone = lambda: (shutil.rmtree(tmp_path / "t/tests"), hermes(SUBMIT))[1]
    r, _ = rolled_out(tmp_path, tokenizers["tiny"], gone)
    assert r.finish == "void:died" and r.reward == 0


def test_a_sandbox_that_does_not_start_voids_the_rollout(tmp_path, tokenizers, monkeypatch):
    """Also if there never was one."""
    monkeypatch.setattr(tmax, "bwrap_path", lambda: "/usr/bin/false")
    r = asyncio.run(tmax.rollout(None, tmax.load_task(make_task(tmp_path / "t")), tokenizers["tiny"], CFG))
    assert r.void and len(r.tokens) == len(r.mask) == r.prompt_tokens and not any(r.mask)


# ---------------------------------------------------------------------------------------------------------------------
# Oracle
# ---------------------------------------------------------------------------------------------------------------------

def test_oracle_tells_sound_tasks_from_broken_ones(tmp_path):
    """`--eval --oracle` from the command line, without a model or a GPU: the solution runs where the agent would, with the files
    beside it, and the tests decide. What is printed is what eval.json holds."""
    test = f'[ -e /app/done ] || exit; [ "$(cat /app/done)" = yes ] && echo 1 >{TXT} || echo 0.5 >{TXT}'
    tasks = {"right": "cp /solution/data done", "wrong": "echo no >done", "slow": "cp /solution/data done; sleep 60", "none": None}
    for name, solution in tasks.items():
        files = {"solution/solve.sh": solution, "solution/data": "yes"} if solution else {}
        make_task(tmp_path / "tasks" / name, test, toml=f"[agent]\ntimeout_sec = {4 if name == 'slow' else 60}", files=files)
    make_task(tmp_path / "tasks/skipped-1")
    flags = "--eval --oracle --sandbox bwrap --model /nowhere --name o --exclude skipped-* --tasks".split()
    ran = subprocess.run([sys.executable, tmax.__file__, *flags, tmp_path / "tasks"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    wanted = {"right": (1.0, "submitted"), "wrong": (0.5, "submitted"), "slow": (1.0, "timeout"), "none": (0.0, "no_solution")}
    scores = json.loads((tmp_path / "runs/o/eval.json").read_text())
    assert {t["task"]: (t["rewards"][0], t["finish"][0]) for t in scores["tasks"]} == wanted and scores["mean"] == 0.625
    assert "\n4 tasks / 62.5 % over 1 run\n" in ran.stdout and "4 of 5 tasks taken" in ran.stdout
    for name, (reward, finish) in wanted.items():
        assert re.search(rf"^{name} +{reward // 1:.2f}  {finish}$", ran.stdout, re.M), ran.stdout
    assert sorted(p.name for p in (tmp_path / "runs/o").iterdir()) == ["config.json", "eval.json", "rollouts.jsonl"]


# ---------------------------------------------------------------------------------------------------------------------
# Images, on a real Docker engine
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def images(tmp_path, monkeypatch):
    """image_of(task) of a fresh process in a fresh folder, with the client of the engine; skipped where none answers."""
    if not tmax.engine_answers():
        pytest.skip("no Docker engine answers; .ci/run starts one")
    for name, fresh in dict(image_locks={}, images_failed=set()).items():
        monkeypatch.setattr(tmax, name, fresh)
    monkeypatch.chdir(tmp_path)
    cfg = dataclasses.replace(DOCKER, name="run")
    client = tmax.docker_client()
    return SimpleNamespace(client=client, of=lambda task, stop=SimpleNamespace(wait=lambda pause: time.sleep(min(pause, 0.05))): tmax.image_of(client, task, cfg, stop),
                           log=lambda: "".join(p.read_text() for p in tmp_path.glob("runs/run/images/*.log")))


def recipe(folder, lines, **files):
    """A task with environment/Dockerfile and files beside it."""
    environment = {f"environment/{name}": text for name, text in {"Dockerfile": lines, **files}.items()}
    return tmax.load_task(make_task(folder, files=environment))


def test_an_image_is_built_once_for_each_content(images, tmp_path):
    """Rollouts of two tasks with the same environment, all at once, share one build; another file beside the Dockerfile makes
    another image; a later start finds both."""
    mark = uuid.uuid4().hex
    tasks = [recipe(tmp_path / name, "FROM scratch\nCOPY f /f", f=f"{mark} {content}") for name, content in (("a", 1), ("b", 1), ("c", 2))]
    try:
        with ThreadPoolExecutor(12) as pool:
            names = list(pool.map(images.of, tasks * 4))
        assert names == names[:3] * 4 and names[0] == names[1] != names[2]
        assert [len(images.client.images.get(name).history()) for name in set(names)] == [1, 1]
        assert images.log().count("docker build") == 2
        tmax.image_locks.clear()
        assert list(map(images.of, tasks)) == names[:3] and images.log().count("docker build") == 2
    finally:
        for name in {images.of(task) for task in tasks}:
            images.client.images.remove(name)


@pytest.mark.parametrize("lines, said", [("FROM scratch\nCOPY gone /f", "gone"), ("FROM tmax-no/such-image:1", "such-image"), ("HELLO", "HELLO")])
def test_an_image_that_cannot_be_built(images, tmp_path, capsys, lines, said):
    """The rollouts are void, the engine's reason is in the log, and after three failures, which a group shares, the task is set
    aside and that is said once."""
    task = recipe(tmp_path / "t", lines)
    with ThreadPoolExecutor(8) as pool:
        lost = [pool.submit(images.of, task).exception() for _ in range(8)]
    assert [str(error) for error in lost] == ["image"] * 8 and all(isinstance(error, tmax.SandboxLost) for error in lost)
    assert images.log().count("docker build") == 3 and said in images.log()
    told, = capsys.readouterr().err.splitlines()
    assert "task t is set aside" in told and "runs/run/images/" in told


def test_an_engine_that_went_away_sets_no_image_aside(images, tmp_path, monkeypatch):
    """The sandbox waits for it and tries again."""
    monkeypatch.setattr(tmax, "engine_answers", lambda: False)
    with pytest.raises(tmax.docker.errors.DockerException):
        images.of(recipe(tmp_path / "t", "HELLO"))
    assert images.log().count("docker build") == 1 and not tmax.images_failed


def test_a_build_that_takes_too_long_is_stopped(images, image, tmp_path):
    """At [environment] build_timeout_sec; what it ran is gone. A rollout that was cancelled begins none, which is no failure."""
    task = dataclasses.replace(recipe(tmp_path / "t", f"FROM {image}\nRUN sleep 987"), build_timeout=3.0)
    start = time.monotonic()
    with pytest.raises(tmax.SandboxLost, match="image"):
        images.of(task)
    assert 9 <= time.monotonic() - start < 40 and images.log().count("sending signal TERM") == 3
    tmax.images_failed.clear()
    (stop := threading.Event()).set()
    with pytest.raises(tmax.SandboxLost, match="image"):
        images.of(task, stop)
    assert images.log().count("docker build") == 3 and not tmax.images_failed
    start, stop = time.monotonic(), threading.Event()
    threading.Timer(1, stop.set).start()
    with pytest.raises(tmax.SandboxLost, match="image"):
        images.of(dataclasses.replace(task, build_timeout=600.0), stop)
    assert time.monotonic() - start < 30 and images.log().count("docker build") == 4
    assert not tmax.images_failed
    wait_for(lambda: not any("sleep 987" in str(c.attrs["Config"]["Cmd"]) for c in images.client.containers.list(ignore_removed=True)), 20)


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """A registry with one image, behind a password that only the Docker configuration knows. Yields its address and a list: the
    status of the next answers to those who know it, taken from the end."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.addfile(*member(f"file-{uuid.uuid4().hex}", data=b"x"))
    digest = lambda data: "sha256:" + hashlib.sha256(data).hexdigest()
    config = dict(architecture="amd64", os="linux", config={}, rootfs=dict(type="layers", diff_ids=[digest(layer.getvalue())]))
    blobs, failures = {digest(data): data for data in (layer.getvalue(), json.dumps(config).encode())}, []
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    parts = [dict(digest=name, size=len(data), mediaType=f"application/vnd.docker.{what}") for (name, data), what in
             zip(blobs.items(), ("image.rootfs.diff.tar", "container.image.v1+json"))]
    manifest = json.dumps(dict(schemaVersion=2, mediaType=kind, config=parts[1], layers=parts[:1])).encode()
    password = base64.b64encode(b"user:secret").decode()

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.headers.get("Authorization") == f"Basic {password}"
            status = failures.pop() if known and failures and "/manifests/" in self.path else 200 if known else 401
            data = blobs.get(self.path.rpartition("/")[2], manifest if "/manifests/" in self.path else b"{}") if status == 200 else b"{}"
            self.send_response(status)
            for header in (("Content-Type", kind if data == manifest else "application/octet-stream"), ("Content-Length", len(data)),
                           ("Docker-Content-Digest", digest(data)), ("WWW-Authenticate", 'Basic realm="test"')):
                self.send_header(*map(str, header))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET
        log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    (tmp_path / "config.json").write_text(json.dumps({"auths": {address: {"auth": password}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    yield address, failures
    server.shutdown()


def test_an_image_is_pulled(images, registry, tmp_path, monkeypatch):
    """From a registry that asks for a password, with the login of the Docker configuration; an error there is tried again, once for
    all who wait; without the login the rollout is void."""
    address, failures = registry
    task = tmax.load_task(make_task(tmp_path / "t", files={"image.txt": f"{address}/team/image:1"}))
    failures += [500, 500]  # to the engine's HEAD and to its GET
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(images.of, [task] * 4)) == [task.image] * 4
    assert failures == [] and images.log().count("docker pull") == 2
    images.client.images.remove(task.image)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "nothing"))
    with pytest.raises(tmax.SandboxLost, match="image"):
        images.of(task)
    assert images.log().count("docker pull") == 5 and "no basic auth credentials" in images.log()


def test_tasks_run_as_they_say(images, image, tmp_path, capsys):
    """The oracle on tasks whose Dockerfile starts from a local image: what task.toml and the folder say is there, solutions pass,
    a wrong one fails, timeouts end them, an image that cannot be built voids. One build serves all with the same environment."""
    look = f'[ -e /built ] && [ "$(cat /workspace/seed)" = x ] && [ "$KEY" = "a b" ] && [ -e /tmp/done ] && echo 1 >{TXT}'
    toml = "[agent]\ntimeout_sec = {}\n{}[verifier]\ntimeout_sec = {}\n[verifier.env]\nKEY = 'a b'\n[environment]\nmemory_mb = {}"
    tasks = {   # solution, tests, task.toml, Dockerfile -> reward, end
        "right": ("touch /tmp/done", look, toml.format(60, "", 60, 512), "touch /built", 1, "submitted"),
        "wrong": ("touch /tmp/other", look, toml.format(60, "", 60, 512), "touch /built", 0, "submitted"),
        "slow": ("touch /tmp/done; sleep 600", look, toml.format(8, "", 60, 512), "touch /built", 1, "timeout"),
        "slow-tests": ("", f"echo 1 >{TXT}; sleep 600", toml.format(60, "", 2, 512), "touch /built", 0, "submitted"),
        "user": ("id -un >/tmp/who", f'[ "$(cat /tmp/who) $(id -un)" = "worker root" ] && echo 1 >{TXT}',
                 toml.format(60, "user = 'worker'\n", 60, 512), "touch /built", 1, "submitted"),
        "memory": ("python3 -c 'x = bytearray(300 << 20)' || touch /tmp/stopped; python3 -c 'x = bytearray(20 << 20)' && touch /tmp/small",
                   f"[ -e /tmp/stopped ] && [ -e /tmp/small ] && echo 1 >{TXT}", toml.format(60, "", 60, 100), "touch /built", 1, "submitted"),
        "unbuilt": ("", "", toml.format(60, "", 60, 512), "exit 3", 0, "void:image"),
    }
    for name, (solution, test, spec, step, *_) in tasks.items():
        make_task(tmp_path / "tasks" / name, test, toml=spec, seeds={"seed": "x"},
                  files={"solution/solve.sh": solution, "environment/Dockerfile": f"FROM {image}\nVOLUME /data\nRUN {step} # {tmp_path}"})
    volumes = images.client.volumes.list()
    tmax.oracle(dataclasses.replace(DOCKER, tasks=[str(tmp_path / "tasks")], eval=True, oracle=True, image="", network="none", name="run"))
    said = {t["task"]: t for t in map(json.loads, Path("runs/run/rollouts.jsonl").open())}
    assert {name: (t["reward"], t["finish"]) for name, t in said.items()} == {name: (r, end) for name, (*_, r, end) in tasks.items()}
    assert "stopped after 2 s" in str(said["slow-tests"]["transcript"]) and "code: 3" in images.log()
    assert images.log().count(": unbuilt: ") == 3 and "7 of 7 tasks taken" in capsys.readouterr().out
    assert not [c for c in images.client.containers.list(all=True, ignore_removed=True) if str(tmp_path) in str(c.attrs["Config"]["Cmd"])]
    assert images.client.volumes.list() == volumes
    images.client.images.remove(images.of(tmax.load_task(tmp_path / "tasks/right")))


# ---------------------------------------------------------------------------------------------------------------------
# One real engine for these tests, in this process; and a whole tiny run, in processes of its own
# ---------------------------------------------------------------------------------------------------------------------

TINY = tmax.Config(**tmax.TINY | dict(num_learners=1, num_engines=1))
HOT = dataclasses.replace(TINY, temperature=2.0)     # so that some turns are long
MARK = f"tmax-test-{os.getpid()}"      # in the environment of everything that a test starts


def ours():
    """Command lines of what tests have started and is still alive; sandboxes, whose environment is their own, if they are orphans."""
    alive = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command, parent = (process / "cmdline").read_bytes(), (process / "stat").read_text().rpartition(")")[2].split()[1]
            if int(process.name) != os.getpid() and (f"TMAX_MARK={MARK}".encode() in (process / "environ").read_bytes()
                                                     or b"/dev/shm/.shell" in command and parent == "1"):
                alive.append(command[:100])
    return alive


def debris(folder):
    """What a run could leave behind: processes, shared memory that no living process uses, mounts, temporary files (they go to
    folder/tmp). Other runs on this machine do not count."""
    (folder / "tmp").mkdir(exist_ok=True)
    maps = ""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            maps += (process / "maps").read_text()
    shared = {name for name in os.listdir("/dev/shm") if f"/dev/shm/{name}" not in maps
              and not (name.startswith("tmax-") and Path("/proc", name.split("-")[1]).exists())}
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    return ours(), shared, mounts, os.listdir(folder / "tmp")


def assert_nothing_new(folder, before, seconds=30):
    """Wait for the debris of a run to be gone. What earlier runs left may go too: a start cleans up after dead ones."""
    new = lambda: [sorted(set(now) - set(then)) for now, then in zip(debris(folder), before)]
    end = time.monotonic() + seconds
    while any(new()) and time.monotonic() < end:
        time.sleep(0.2)
    assert not any(left := new()), left


def wait_for(condition, seconds=120):
    """Wait until condition() is true; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


STARTED = []


@pytest.fixture(autouse=True)
def nothing_runs_on():
    """What a failed test has started ends with it."""
    yield
    for process in STARTED:
        process.kill()
    STARTED.clear()


def start(*args, **kw):
    STARTED.append(subprocess.Popen(*args, **kw))
    return STARTED[-1]


def start_run(folder, *flags):
    """`python tmax.py --tiny …` in a folder of its own, as a user starts it."""
    (folder / "tmp").mkdir(exist_ok=True)
    log = (folder / f"log-{flags[1]}").open("w")
    return start([sys.executable, tmax.__file__, "--tiny", *flags], cwd=folder, stdout=log, stderr=log,
                            env=os.environ | {"TMAX_MARK": MARK, "TMPDIR": str(folder / "tmp")})


def last_line(folder, name):
    return (folder / f"log-{name}").read_text().splitlines()[-1]


@pytest.fixture(scope="session")
def held_out(tiny_model, tmp_path_factory):
    """Four tasks of three kinds to evaluate on."""
    folder = tmp_path_factory.mktemp("held_out")
    for task in sorted(tiny_model[1].iterdir())[::32]:
        shutil.copytree(task, folder / task.name)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, held_out):
    """The folder of a short tiny run: run folder, tasks, warm-started model, checkpoint, metrics, transcripts."""
    folder = tmp_path_factory.mktemp("e2e")
    before = debris(folder)
    run = start_run(folder, "--name", "e2e", "--training_steps", "6", "--prompts_per_step", "8",
                    "--eval_every", "3", "--eval_tasks", str(held_out), "--eval_runs", "2")
    assert run.wait(600) == 0, last_line(folder, "e2e")
    assert_nothing_new(folder, before)
    return folder / "runs/e2e"


@pytest.fixture(scope="session")
def metrics(tiny_run):
    return [json.loads(line) for line in (tiny_run / "metrics.jsonl").open()]


@pytest.fixture(scope="session")
def rollout_lines(tiny_run):
    return [json.loads(line) for line in (tiny_run / "rollouts.jsonl").open()]


@pytest.fixture(scope="session")
def transcripts(rollout_lines):
    """Those of training: a rollout of an evaluation tells its run."""
    return [line for line in rollout_lines if "run" not in line]


def test_metrics_have_the_agreed_keys(metrics):
    """One object a step, with the keys that forks and plots rely on."""
    keys = set("""step reward groups_kept groups_zero_spread groups_stale rollouts_void tokens loss grad_norm kept_fraction
                  mismatch_max drift_max entropy staleness_max seconds_generate seconds_train seconds_reload
                  staleness_mean seconds_gather_write learners_waited waiting_model waiting_bash waiting_grading""".split())
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(keys <= set(m) for m in metrics)


def test_engine_and_learner_agree_in_every_step(metrics):
    """The same weights on both sides give the same logprobs, to 1e-4 in fp32, also after reloads."""
    seen = [m["mismatch_max"] for m in metrics if m["mismatch_max"] is not None]
    assert seen and max(seen) <= 1e-4
    assert metrics[0]["mismatch_max"] == metrics[0]["drift_max"]            # nothing was stale yet
    assert any(m["drift_max"] > 1e-3 for m in metrics[1:])                  # and then something was


def test_staleness_is_bounded(metrics):
    """No token that was trained lags more than async_steps versions."""
    assert max(m["staleness_max"] for m in metrics) <= TINY.async_steps


def test_reward_counts_every_graded_rollout(metrics, transcripts):
    """The step's reward is the mean over all graded rollouts that came back, solved groups included."""
    for m in metrics:
        rewards = [t["reward"] for t in transcripts if t["step"] == m["step"] and not t["finish"].startswith("void")]
        assert m["reward"] == pytest.approx(np.mean(rewards))
    assert 0.1 < metrics[0]["reward"] < 0.6                                 # what the warm start left


def test_only_submissions_are_rewarded(transcripts):
    """Every other end is reward 0 with tests not run."""
    assert {t["finish"] for t in transcripts} <= {"submitted", "no_call", "max_steps", "max_tokens"}
    for t in transcripts:
        assert (t["transcript"][-1]["role"] == "verifier") == (t["finish"] == "submitted")
        assert t["finish"] == "submitted" or t["reward"] == 0


def test_tiny_tasks_are_harbor_folders(tiny_run):
    """At least 100 of at least three kinds, and the demonstrations are about none of them."""
    tasks = tmax.load_tasks(tiny_run / "tasks", TINY)
    assert len(tasks) >= 100 and len({t.name.split("-")[0] for t in tasks}) >= 3
    for t in tasks:
        assert all((t.path / part).exists() for part in ("instruction.md", "task.toml", "environment", "tests/test.sh"))
    _, _, demonstrations = tmax.make_tiny(tiny_run.parent / "again", TINY.seed)
    assert not any(tmax.tiny_task(*t.name.split("-")) in demonstrations for t in tasks)


def test_checkpoint_is_a_hugging_face_folder(tiny_run):
    """Model and tokenizer load by transformers, with the chat template, and the weights have moved."""
    checkpoint = tiny_run / "checkpoint-6"
    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in (tiny_run / "model", checkpoint))
    assert any((a != b).any() for a, b in zip(before.parameters(), after.parameters()))
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template
    assert not list(tiny_run.glob("*.partial"))


def descendants(pid):
    """{pid: command line} of all processes below one."""
    children = [int(p) for t in Path(f"/proc/{pid}/task").glob("*") for p in (t / "children").read_text().split()]
    return {p: text for child in children for p, text in
            ({child: Path(f"/proc/{child}/cmdline").read_bytes().decode().replace("\0", " ")} | descendants(child)).items()}


@pytest.mark.parametrize("victim, learners, engines, said", [
    ("learner", 1, 1, None), ("generator", 1, 1, "error: generator: .*ended unexpectedly"),
    ("engine", 1, 2, "error: generator: .*Engine"), ("interrupt", 2, 1, "stopped"), ("rank", 2, 1, "error: learner rank 1: killed by SIGKILL"),
    pytest.param("launcher", 2, 2, None, marks=pytest.mark.slow),
    pytest.param("generator", 2, 2, "error: generator: .*ended unexpectedly", marks=pytest.mark.slow)])
def test_killed_run_leaves_nothing(tiny_run, tmp_path, victim, learners, engines, said, request):
    """SIGKILL of any process, or Ctrl-C: everything ends within a minute and not with 0, nothing is left, metrics so far can be
    read; the last line is the reason, and names the newest checkpoint. Some in containers, where there is an engine."""
    before, docker = debris(tmp_path), victim in ("generator", "interrupt") and tmax.engine_answers()
    flags = ("--sandbox", "docker", "--image", request.getfixturevalue("image")) if docker else ()
    flags += ("--model", str(tiny_run / "model"), "--tasks", str(tiny_run / "tasks"), "--prompts_per_step", "2", "--save_every", "1",
              "--num_learners", str(learners), "--num_engines", str(engines))
    run = start_run(tmp_path, "--name", victim, *flags)
    steps = tmp_path / f"runs/{victim}/metrics.jsonl"
    wait_for(lambda: list(steps.parent.glob("checkpoint-*[0-9]")), 180)
    below = descendants(run.pid)
    leads = lambda p: Path(f"/proc/{p}").exists() and os.getpgid(p) == p
    generator, = (p for p in below if "spawn_main" in below[p] and leads(p))
    chosen = {"learner": run.pid, "launcher": run.pid, "interrupt": run.pid, "generator": generator,
              "engine": next((p for p in below if "EngineCore" in below[p]), None),
              "rank": max(p for p in below if "tmax.py" in below[p]) if learners > 1 else None}[victim]
    os.kill(chosen, signal.SIGINT if victim == "interrupt" else signal.SIGKILL)
    assert run.wait(60) != 0
    assert_nothing_new(tmp_path, before)
    wait_for(lambda: not docker or not tmax.docker_client().containers.list(all=True, filters={"label": f"tmax.run={victim}"}, ignore_removed=True), 30)
    assert all(json.loads(line)["step"] for line in steps.open())
    if said:
        last = last_line(tmp_path, victim)
        assert re.match(said, last)
        assert victim == "interrupt" or re.search("; newest checkpoint: runs/.*/checkpoint-[1-9]", last)


@pytest.fixture(scope="session")
def live(tiny_run):
    """A real engine on an event loop in a thread; `call` runs a coroutine there."""
    threads, loop = torch.get_num_threads(), asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    call = lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(300)

    async def make():
        engine = tmax.Engine(tiny_run / "model", HOT)
        await engine.llm.update_weight_version("0")
        return engine
    engine = call(make())
    torch.set_num_threads(threads)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):   # vLLM's here; what tests start would take them for torchrun's
        os.environ.pop(name, None)
    yield SimpleNamespace(engine=engine, call=call)
    engine.llm.shutdown(timeout=0)


def learner_logprobs(folder, turn, prompt):
    """Logprobs of a turn by the learner's own path: Policy over a pack."""
    r = tmax.Rollout("t", [], [], [], [], len(prompt))
    r.append(prompt, 0)
    r.append(turn.tokens, 1, turn.logprobs, turn.versions)
    with torch.no_grad():
        return tmax.load_policy(folder, HOT, sharded=False).run(tmax.build_pack([r]))[0]


PROMPT = list(range(300, 340))


def test_logprobs_match_before_and_after_a_reload(live, tiny_run):
    """mismatch <= 1e-4 in fp32 under the first weights, under new ones, and under the first again."""
    for version, folder in enumerate([tiny_run / "model", tiny_run / "checkpoint-6", tiny_run / "model"]):
        if version:
            live.call(live.engine.reload(folder, version))
        turn = live.call(live.engine.generate(PROMPT, 64, []))
        assert set(turn.versions) == {version} and len(turn.versions) == len(turn.tokens) == len(turn.logprobs) <= 64
        gap = learner_logprobs(folder, turn, PROMPT) - torch.tensor(turn.logprobs)
        assert gap.abs().max() <= 1e-4


def test_rollout_in_flight_goes_on_under_new_weights(live, tiny_run):
    """A turn that spans a reload has tokens of two versions, each with the logprobs of its own weights."""
    async def both(delay):
        requests = [asyncio.create_task(live.engine.generate(PROMPT, 256, [])) for _ in range(48)]
        await asyncio.sleep(delay)
        await live.engine.reload(tiny_run / "checkpoint-6", 7)
        return await asyncio.gather(*requests)
    for delay in (0.1, 0.3, 1, 3):      # until some were in the middle
        live.call(live.engine.reload(tiny_run / "model", 6))
        if spanning := [turn for turn in live.call(both(delay)) if len(set(turn.versions)) == 2]:
            break
    assert spanning
    for turn in spanning:
        assert turn.versions == sorted(turn.versions) and set(turn.versions) == {6, 7}
        old, theirs = np.array(turn.versions) == 6, np.array(turn.logprobs)
        assert np.abs(learner_logprobs(tiny_run / "model", turn, PROMPT).numpy() - theirs)[old].max() <= 1e-4
        assert np.abs(learner_logprobs(tiny_run / "checkpoint-6", turn, PROMPT).numpy() - theirs)[~old].max() <= 1e-4


@pytest.mark.parametrize("fp32", [True, False])
def test_fp32_head_is_on_both_sides_or_neither(live, tiny_run, fp32, monkeypatch):
    """--fp32_lm_head: what vLLM would start with for a bf16 model, and what the learner computes."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")     # vLLM writes it too; so it is gone with this test
    cfg = dataclasses.replace(TINY, dtype="bfloat16", fp32_lm_head=fp32)
    config = tmax.engine_args(tiny_run / "model", cfg).create_engine_config().model_config
    assert config.dtype == torch.bfloat16 and config.head_dtype == (torch.float32 if fp32 else torch.bfloat16)
    assert tmax.load_policy(tiny_run / "model", cfg, sharded=False).fp32_lm_head is fp32


def test_noise_is_fresh_every_time(live):
    """No seed is sent: the same request twice gives different samples."""
    first, second = (live.call(live.engine.generate(PROMPT, 64, [])) for _ in range(2))
    assert first.tokens != second.tokens


def test_rollout_with_engine_and_sandbox(live, tiny_run):
    """A rollout end to end: sampled tokens marked, prompt by the model's template, budget kept."""
    task = tmax.load_tasks(tiny_run / "tasks", TINY)[0]
    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "model")
    r = live.call(tmax.rollout(live.engine, task, tokenizer, TINY))
    assert len(r.tokens) == len(r.mask) == len(r.logprobs) == len(r.versions) <= r.prompt_tokens + TINY.max_total_tokens
    assert not any(r.mask[:r.prompt_tokens]) and any(r.mask)
    assert all((v >= 0) == bool(m) for m, v in zip(r.mask, r.versions))


def test_long_prompts_are_dropped_and_counted(tiny_run, capsys):
    """A task over --max_prompt_tokens is left out before the run starts; if all are, the run does not start."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "model")
    short = tmax.Task("short", Path("/nonexistent"), "Write the word amber")
    size = len(tmax.chat_format(tokenizer).prompt(short.instruction))
    fits, too_small = dataclasses.replace(TINY, max_prompt_tokens=size), dataclasses.replace(TINY, max_prompt_tokens=size - 1)
    assert tmax.drop_long_prompts([short, dataclasses.replace(short, instruction=short.instruction + " amber")], tokenizer, fits) == [short]
    assert capsys.readouterr().out == f"dropped: the prompts of 1 of 2 tasks are longer than {size} tokens\n"
    with pytest.raises(tmax.UserError, match="--max_prompt_tokens: the prompts of 1 of 1 tasks are longer"):
        tmax.drop_long_prompts([short], tokenizer, too_small)
    with pytest.raises(tmax.UserError, match="--max_prompt_tokens: .* of 1 of 2 tasks are longer"):     # its mean would be of other tasks
        tmax.drop_long_prompts([short, dataclasses.replace(short, instruction=short.instruction + " amber")], tokenizer,
                               dataclasses.replace(fits, eval=True))


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--seed 1", "--seed 2", "--seed 3", "--num_learners 2 --num_engines 2"])
def test_reward_rises(tmp_path, flags):
    """The tiny recipe learns, with any seed and on several ranks: from at most 0.5 to at least 0.8, by at least 0.35."""
    run = start_run(tmp_path, "--name", "learn", *flags.split())
    assert run.wait(1800) == 0, last_line(tmp_path, "learn")
    rewards = [json.loads(line)["reward"] for line in (tmp_path / "runs/learn/metrics.jsonl").open()]
    first, last = np.mean(rewards[:5]), np.mean(rewards[-5:])
    assert 0.2 <= first <= 0.5 and last >= 0.8 and last - first >= 0.35


# ---------------------------------------------------------------------------------------------------------------------
# Asynchrony: real engines and sandboxes; how many tokens a rollout samples and how long its commands take is given
# ---------------------------------------------------------------------------------------------------------------------

ALONE = tmax.Cell(0, 1, 0, 1, None)
# Turns, seconds of the model and seconds of bash of 120 real Terminal-Bench 2.0 rollouts of the 9B model, five per task.
REAL_TIMES = [[float(x) for x in triple.split("/")] for triple in """
51/180/389 64/151/754 60/200/667 63/256/939 62/281/539 24/370/49 19/483/20 22/391/57 20/470/14 11/563/25 64/172/399
64/144/362 62/249/446 64/127/494 64/207/312 33/260/93 30/304/88 35/398/97 38/532/91 28/382/42 29/185/75 26/187/45 31/263/43
26/184/61 27/242/50 30/185/114 20/104/49 24/98/52 29/99/24 36/234/183 49/138/58 31/71/34 35/76/42 52/192/76 35/66/44
64/315/106 59/262/210 43/154/38 49/104/40 58/187/115 12/27/69 14/65/61 27/105/77 21/83/129 11/22/82 8/13/7 8/8/7 7/13/6 8/8/7
8/12/6 58/455/240 11/19/128 62/381/435 20/81/300 27/247/177 25/130/51 15/94/20 10/73/14 25/112/38 21/102/49 43/248/104
26/201/55 38/311/36 47/248/102 36/261/100 16/38/30 15/30/22 13/30/7 14/68/36 15/29/26 16/53/124 19/68/59 15/56/74 24/100/182
18/79/104 42/122/110 16/43/34 16/45/22 24/58/25 19/66/34 16/58/122 28/344/430 27/129/301 15/67/85 19/68/402 27/367/29
32/381/72 31/466/74 26/353/198 32/1055/85 14/12/16 52/443/148 24/35/66 8/6/5 11/13/6 24/64/69 23/91/81 22/111/112 20/57/57
26/78/145 39/153/213 25/115/71 11/30/33 34/171/230 17/76/25 28/410/61 26/406/93 23/519/56 18/410/53 26/370/181 45/315/753
36/286/689 64/285/372 31/150/162 57/266/285 35/519/41 28/401/28 20/356/33 25/375/60 29/334/20""".split()]


class TimedEngine(tmax.Engine):
    """vLLM, and for how much of the time each engine had work; the spec's fault comes with the third version."""

    def __init__(self, model, cfg):
        super().__init__(model, cfg)
        self.busy, self.since, self.worked, self.start = [0] * cfg.num_engines, [0.0] * cfg.num_engines, 0.0, time.monotonic()

    async def generate(self, tokens, budget, stop_ids, engine_rank=0, cfg=None):
        self.since[engine_rank] = time.monotonic() if not self.busy[engine_rank] else self.since[engine_rank]
        self.busy[engine_rank] += 1
        try:
            return await super().generate(tokens, budget, stop_ids, engine_rank, cfg)
        finally:
            self.busy[engine_rank] -= 1
            self.worked += 0 if self.busy[engine_rank] else time.monotonic() - self.since[engine_rank]

    async def reload(self, folder, version):
        spec = json.loads(os.environ["TMAX_REPLAY"])
        now = time.monotonic()
        worked = self.worked + sum(now - since for since, busy in zip(self.since, self.busy) if busy)
        Path(spec["folder"], "worked").write_text(str(worked / (now - self.start) / len(self.busy)))
        if version == 3 and spec["fault"] == "refuses":
            save_file({"no.such.weight": torch.zeros(1)}, folder / "model.safetensors")
        if version == 3 and spec["fault"] == "dies":
            os.kill(next(p for p, command in descendants(os.getpid()).items() if "EngineCore" in command), signal.SIGKILL)
        return await super().reload(folder, version)


started = itertools.count()


async def timed_rollout(engine, task, tokenizer, cfg, engine_rank=0):
    """What a model would decide is given: TMAX_REPLAY holds (turns, sampled tokens, seconds of bash), taken in order. Engine,
    sandbox, `sleep` and tests are real."""
    times = json.loads(os.environ["TMAX_REPLAY"])["times"]
    turns, tokens, bash = times[next(started) % len(times)]
    chat = tmax.chat_format(tokenizer)
    r = tmax.Rollout(task.name, [], [], [], [], 0, finish="submitted")
    r.append(chat.prompt(task.instruction), 0)
    async with tmax.Sandbox(task, cfg) as box:
        for _ in range(turns):
            turn = await engine.generate(r.tokens, max(1, tokens // turns), [], engine_rank, cfg)
            r.append(turn.tokens, 1, turn.logprobs, turn.versions)
            with tmax.waiting("bash"):
                await box.run(f"sleep {bash / turns:.3f}")
            r.append(chat.tool_turn(["(no output)"]), 0)
        r.reward = await box.grade()
    return r


def replay_main(*args):
    tmax.Engine, tmax.rollout = TimedEngine, timed_rollout
    tmax.generator_main(*args)


@pytest.fixture
def replay(tmp_path, tiny_model, process_group, monkeypatch):
    """Runs train() with those rollouts and a tiny learner; returns metrics.jsonl as a list."""
    monkeypatch.setattr(tmax, "generator_main", replay_main)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    make_task(tmp_path / "t", test="echo $((RANDOM % 2)) >/logs/verifier/reward.txt")
    task = tmax.load_task(tmp_path / "t")

    def run(times, seconds_update=0.0, fault=None, **cfg):
        update = tmax.Learner.update
        monkeypatch.setattr(tmax.Learner, "update", lambda *args: (time.sleep(seconds_update), update(*args))[1])
        monkeypatch.setenv("TMAX_REPLAY", json.dumps(dict(times=times, fault=fault, folder=str(tmp_path))))
        defaults = dict(max_total_tokens=1024, num_learners=1, num_engines=1)
        try:
            tmax.train(dataclasses.replace(TINY, **defaults | cfg), ALONE, tmp_path, tiny_model[0], [task], [])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    return run


@pytest.mark.parametrize("async_steps, seconds_update, slow", [(0, 0.0, 1.0), (2, 0.6, 0.0), (2, 0.0, 1.0)],
                         ids=["synchronous", "slow learner", "slow commands"])
def test_staleness_never_exceeds_the_bound(replay, tmp_path, async_steps, seconds_update, slow):
    """With a learner that sleeps, and with commands that do, in real sandboxes: no token that was trained lags more than
    async_steps versions; behind the slow learner some lag as much. The metrics say who waits."""
    times = [[2, 30, slow * (i % 7 == 0)] for i in range(50)]
    metrics = replay(times, seconds_update, async_steps=async_steps, prompts_per_step=2, samples_per_prompt=4,
                     training_steps=6 if async_steps else 4, max_concurrent_rollouts=1000)
    assert all(m["updated"] for m in metrics)
    oldest = max(m["staleness_max"] for m in metrics)
    assert oldest == async_steps if seconds_update else oldest <= async_steps
    assert slow or not any(m["groups_stale"] for m in metrics)      # by construction, not by the safety net
    assert all(0 <= m["staleness_mean"] <= m["staleness_max"] for m in metrics)
    for line in (tmp_path / "rollouts.jsonl").open():
        assert async_steps or len(json.loads(line)["versions"]) == 1
    waited = np.mean([m["learners_waited"] for m in metrics[1:]])
    assert waited < 0.5 if seconds_update else any(m["waiting_bash"] for m in metrics)


@pytest.mark.parametrize("fault, said", [("refuses", "no module or parameter"), ("dies", "EngineDeadError")])
def test_failed_reload_ends_the_run_and_leaves_a_checkpoint(replay, tmp_path, fault, said):
    """Weights that the engines cannot load, or an engine that dies over them: fatal, with the reason; what was learnt is saved."""
    with pytest.raises(tmax.RunFailed, match=f"generator: .*{said}.*generator.log"):
        replay([[1, 10, 0.0]], fault=fault, prompts_per_step=2, samples_per_prompt=4, training_steps=20)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{steps[-1]}")


@pytest.mark.bench
@pytest.mark.parametrize("async_steps", [0, 1, 4])
def test_benchmark_asynchrony(request, replay, tmp_path, capsys, async_steps, scale=0.01, seconds_update=2.0):
    """Real rollouts at a hundredth of their time, bash as real sleeps in real sandboxes, on two engines: a second of the model
    is a quarter of a token of the tiny one."""
    if "bench" not in request.config.option.markexpr:
        pytest.skip("runs with -m bench")
    times = [[min(turns, 4), max(4, round(model / 4)), bash * scale] for turns, model, bash in REAL_TIMES]
    metrics = replay(times, seconds_update, async_steps=async_steps, prompts_per_step=4, samples_per_prompt=5,
                     training_steps=10, max_concurrent_rollouts=1000, num_engines=2)[1:]    # the first step starts everything
    took = sum(m["seconds_generate"] + m["seconds_train"] + m["seconds_gather_write"] for m in metrics)
    with capsys.disabled():
        print(f"\n--async_steps {async_steps}: {sum(5 * m['groups_tried'] for m in metrics) / took:.2f} rollouts/s, "
              f"an engine had work {float((tmp_path / 'worked').read_text()):.0%} of the time, "
              f"the learner waited {np.mean([m['learners_waited'] for m in metrics]):.0%} of it, "
              f"oldest token {max(m['staleness_max'] for m in metrics):.0f} versions, "
              f"{sum(m['groups_stale'] for m in metrics)} stale groups  ({scale:g} of real time, {seconds_update:g} s an update)")


# ---------------------------------------------------------------------------------------------------------------------
# Ranks and nodes
# ---------------------------------------------------------------------------------------------------------------------

RECORDED = tmax.Config(dtype="float32", learning_rate=1e-3, pack_length=200, training_steps=3)


def updates_of_a_rank(folder, cell):
    """Three steps on recorded groups, as train() takes them. A node writes its weights, the first rank the first gradient and
    the metrics. Nodes have unequal shares, so that one of them must fill up its packs."""
    torch.set_num_threads(1)
    groups = torch.load(folder / "groups.pt", weights_only=False)
    learner = tmax.Learner(RECORDED, folder / "model", cell)
    mine = groups if cell.nodes == 1 else groups[:5] if cell.node == 0 else groups[5:]
    rewards = [r.reward for r in sum(mine, [])]
    figures = dict(reward=sum(rewards), rollouts_graded=len(rewards), groups_tried=len(mine), waiting_model=len(mine))
    generator = SimpleNamespace(collect=lambda step, version: (mine, figures),
                                memory=folder / f"{cell.nodes}x{cell.ranks}-{cell.node}")
    gradients, metrics = [], []
    learner.optimizer.register_step_pre_hook(lambda *_: gradients.append(torch.cat(
        [getattr(p.grad, "full_tensor", lambda: p.grad)().flatten() for p in learner.policy.parameters()])))
    for step in (1, 2, 3):
        packs, weights, found = tmax.next_batch(RECORDED, cell, generator, step, learner.version)
        metrics.append(found | learner.update(packs))
        learner.save_weights(weights)
    if dist.get_rank() == 0:
        torch.save((gradients[0], metrics), folder / f"{cell.nodes}x{cell.ranks}.pt")


def recorded_weights(folder):
    """A written folder as one vector, in FP32."""
    state = {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    return torch.cat([state[name].flatten() for name in sorted(state)])


def agent(*args, **kw):
    """A torchrun agent."""
    return start([sys.executable, "-m", "torch.distributed.run", *map(str, args)],
                            env=os.environ | {"TMAX_MARK": MARK, "OMP_NUM_THREADS": "1"}, stderr=subprocess.STDOUT, **kw)


def two_nodes(*args, **kw):
    """Two agents on this machine, a rank each."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}"]
    return [agent("--nnodes", 2, "--nproc_per_node", 1, *meet, *args, **kw) for _ in range(2)]


def test_updates_do_not_depend_on_ranks_and_nodes(tmp_path, policy, groups, process_group):
    """Three steps on one rank, on two ranks of a node, and on two nodes of a rank: the same gradient, weights and metrics."""
    policy.lm.save_pretrained(tmp_path / "model")
    torch.save([[r for r in group if not r.void] for group in groups], tmp_path / "groups.pt")
    agents = [agent("--standalone", "--nproc_per_node", 2, __file__, tmp_path), *two_nodes(__file__, tmp_path)]
    updates_of_a_rank(tmp_path, ALONE)
    assert [a.wait(600) for a in agents] == [0, 0, 0]
    first = recorded_weights(tmp_path / "model")
    (wanted, metrics), moved = torch.load(tmp_path / "1x1.pt"), recorded_weights(tmp_path / "1x1-0/weights") - first
    assert moved.abs().max() > 2e-3     # three steps of 1e-3
    for layout, nodes in [("1x2", 1), ("2x1", 2)]:
        gradient, seen = torch.load(tmp_path / f"{layout}.pt")
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()
        for got, want in zip(seen, metrics):
            assert {k: got[k] for k in ("reward", "tokens")} == {k: pytest.approx(want[k]) for k in ("reward", "tokens")}
            assert [got[k] for k in ("loss", "drift_max")] == pytest.approx([want[k] for k in ("loss", "drift_max")], rel=1e-3)
            assert got["waiting_model"] == nodes        # one on each
        for node in range(nodes):
            delta = recorded_weights(tmp_path / f"{layout}-{node}/weights") - first
            assert (delta - moved).norm() <= 1e-3 * moved.norm()


@pytest.mark.slow
def test_two_nodes_train(tmp_path):
    """Two nodes of one learner and one engine: tasks are shared out, weights are the same, engines of both follow them."""
    flags = "--tiny --name nodes --training_steps 3 --prompts_per_step 4 --save_every 1".split()
    agents = two_nodes(tmax.__file__, *flags, cwd=tmp_path, stdout=(tmp_path / "log-nodes").open("w"))
    assert [a.wait(900) for a in agents] == [0, 0], last_line(tmp_path, "nodes")
    run = tmp_path / "runs/nodes"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    first, second = ([json.loads(line) for line in (run / name).open()] for name in ("rollouts.jsonl", "rollouts-1.jsonl"))
    assert len(metrics) == 3 and {m["groups_kept"] for m in metrics} == {4}
    assert not {t["task"] for t in first} & {t["task"] for t in second}
    for m in metrics:
        rewards = [t["reward"] for t in first + second if t["step"] == m["step"] and not t["finish"].startswith("void")]
        assert m["reward"] == pytest.approx(np.mean(rewards)) and (m["mismatch_max"] or 0) <= 1e-4
    AutoModelForCausalLM.from_pretrained(run / "checkpoint-3")


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------

def planned(folder, *flags, **shapes):
    """(text, problems) of --plan for a config.json without weights."""
    config = Qwen3Config(**shapes)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    cfg = tmax.resolve(tmax.parse_config(["--plan", "--gpu_memory_gb", "80", "--model", str(folder), *flags]))
    return tmax.plan(cfg, cfg.num_learners)


def test_plan_of_the_recipe_fits(tmp_path):
    """Qwen3-8B on 8 x 80 GB: 4 learn, 4 generate, and there is room."""
    text, problems = planned(tmp_path, num_hidden_layers=36, **QWEN3_8B)
    assert not problems and text.endswith("it fits")
    lines = {line.split("  ")[0]: line for line in map(str.strip, text.splitlines())}
    assert "8.19B parameters" in text and "4 learner(s) and 4 engine(s)" in text
    assert lines["optimizer, FP32"].endswith(f"{8 * 8190735360 / 4 / 2**30:.1f}")
    tokens = int((0.92 * 80 - 4 - 2 * 8190735360 / 2**30) * 2**30 / (144 * 1024))      # the recipe's 144 KiB a token
    assert f"{tokens:,} tokens, {tokens / 34816:.1f} rollouts" in lines["KV cache"] and 10 <= tokens / 34816 <= 13
    assert "a reload: 15.3 through" in text


def test_plan_names_what_does_not_fit(tmp_path):
    """Two GPUs of 24 GB hold neither the learner nor a rollout: both are said, with what to change; the exit status tells."""
    flags = ["--num_learners", "1", "--num_engines", "1", "--gpu_memory_gb", "24"]
    text, problems = planned(tmp_path, *flags, num_hidden_layers=36, **QWEN3_8B)
    learner, engine = problems
    assert "a learner needs" in learner and "--num_learners" in learner and "--pack_length" in learner
    assert "an engine has" in engine and "--max_total_tokens" in engine
    assert all(f"does not fit: {p}" in text for p in problems) and "it fits" not in text
    run = subprocess.run([sys.executable, tmax.__file__, "--plan", "--model", tmp_path, *flags], capture_output=True, text=True,
                         env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert (run.returncode, run.stdout) == (1, text + "\n")
    with pytest.raises(tmax.UserError, match="--model: [^\n]*absent[^\n]*$"):
        tmax.plan(tmax.Config(model=str(tmp_path / "absent")), 4)
    assert "4 learner(s)" in planned(tmp_path, "--eval", num_hidden_layers=36, **QWEN3_8B)[0]     # of training, nevertheless


MODEL_30M = dict(hidden_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
                 intermediate_size=1536, vocab_size=12_000, tie_word_embeddings=False)


def learner_growth(folder):
    """(GiB that --plan says, GiB that this process grows by) for a learner and two updates: the first makes Adam's state."""
    AutoModelForCausalLM.from_config(Qwen3Config(**MODEL_30M)).save_pretrained(folder)
    torch.set_num_threads(1)
    cfg = tmax.Config(model=str(folder), dtype="float32", pack_length=512)
    _, parts = tmax.learner_memory(tmax.check_model(folder, cfg), cfg, 1)
    rollout = tmax.Rollout("t", [5] * 64, [0] * 16 + [1] * 48, [-9.0] * 64, [0] * 64, 16, advantage=0.5)
    cell, figures = tmax.join_ranks(), {}
    with measured(figures):
        learner = tmax.Learner(cfg, folder, cell)
        for count in (1, 8):
            learner.update([tmax.build_pack([rollout] * count)])
    return sum(parts.values()) / 2**30, figures["gib"]


def test_plan_of_a_learner_is_what_it_takes(tmp_path):
    """A model of 31M parameters: the estimate is within 20 % of the growth of the process."""
    estimate, grown = in_fresh_process(learner_growth, tmp_path)
    print(f"a learner of 31M parameters: {estimate:.2f} GiB by --plan, {grown:.2f} GiB measured")
    assert 0.8 * grown <= estimate <= 1.2 * grown


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------

def test_eval_is_a_preset_too():
    """--eval sets the authors' sampling and context; tiny budgets and given flags win; training samples from all of pi."""
    cfg = tmax.parse_config(["--eval"])
    assert (cfg.temperature, cfg.top_p, cfg.max_prompt_tokens + cfg.max_total_tokens, cfg.eval_runs) == (0.7, 0.95, 40960, 3)
    tiny = tmax.parse_config(["--tiny", "--eval", "--top_p", "0.9"])
    assert (tiny.temperature, tiny.top_p, tiny.max_total_tokens) == (0.7, 0.9, tmax.TINY["max_total_tokens"])
    for wrong, named in [("--top_p 0.9", "--top_p"), ("--eval --top_p 1.1", "--top_p"), ("--eval --eval_runs 0", "--eval_runs"),
                         ("--eval_every 5", "--eval_every"), ("--eval_tasks .", "--eval_every")]:
        with pytest.raises(tmax.UserError, match=named):
            tmax.parse_config(wrong.split())


@pytest.mark.parametrize("family", ["tiny", "qwen", "llama"])
def test_a_turn_without_a_call_is_answered(tmp_path, tokenizers, family):
    """In an evaluation: no call, a broken call, no call, then the work. The answers are the template's own user turns, mask 0."""
    tokenizer = tokenizers[family]
    says = ["I think.", "<tool_call>{oops</tool_call>", "", hermes("touch /tmp/done"), hermes(SUBMIT)]
    r, engine = rolled_out(tmp_path, tokenizer, *says, eval=True)
    assert (r.finish, r.reward, r.steps, len(engine.calls)) == ("submitted", 1.0, 5, 5)
    assert [m["role"] for m in r.transcript] == ["assistant", "error"] * 3 + ["assistant", "tool", "assistant", "verifier"]
    conversation = [{"role": "system", "content": tmax.SYSTEM_PROMPT}, {"role": "user", "content": "Do it."}] + [
        dict(role="user", content=f"{m['content']} {tmax.FORMAT_MESSAGE}") if m["role"] == "error" else m for m in r.transcript[:-1]]
    wanted = tokenizer.apply_chat_template(conversation, tools=[tmax.BASH_TOOL], tokenize=False).rstrip("\n")
    assert tokenizer.decode(r.tokens, skip_special_tokens=False) == wanted


@pytest.mark.parametrize("says, limits, finish, steps", [
    (["I am done."] * 3, dict(max_steps=4), "max_steps", 4), ([hermes("true")] * 3, dict(max_steps=4), "max_steps", 4),
    (["x" * 300], dict(max_turn_tokens=100), "max_tokens", 1), (["x"] * 9, dict(max_total_tokens=300), "max_tokens", None),
    ([hermes("sleep 300")], {}, "timeout", 2),
], ids=["no calls", "calls", "cut", "no room for an answer", "timeout"])
def test_an_evaluation_grades_every_end(tmp_path, tokenizers, says, limits, finish, steps):
    """The tests run whatever the end; a turn without a call counts as a step, so that it comes."""
    r, _ = rolled_out(tmp_path, tokenizers["tiny"], hermes("touch /tmp/done"), *says, eval=True, toml="[agent]\ntimeout_sec = 3\n", **limits)
    assert (r.finish, r.reward, r.transcript[-1]["role"]) == (finish, 1.0, "verifier") and r.steps == (steps or r.steps) < 9


def test_a_void_rollout_of_an_evaluation_is_tried_three_times(tmp_path, monkeypatch):
    """Then it stays void; one that works ends the trying. A sandbox that does not start is started three times in each rollout."""
    works, sent, starts = tmax.bwrap_path(), [], []
    cfg = dataclasses.replace(CFG, eval=True, oracle=True, num_engines=1)       # a rollout without a model

    async def evaluate(name, failures):
        starts.append(0)
        path = lambda: (starts.append(starts.pop() + 1), "/usr/bin/false" if starts[-1] <= failures else works)[1]
        monkeypatch.setattr(tmax, "bwrap_path", path)
        generator = tmax.Generator(cfg, ALONE, [], SimpleNamespace(send=sent.append))
        generator.rollouts, generator.engine, generator.tokenizer = asyncio.Semaphore(1), None, None
        task = tmax.load_task(make_task(tmp_path / name, files={"solution/solve.sh": "true"}))
        await generator._evaluate(0, task, 2, cfg)
    asyncio.run(evaluate("a", 3))
    asyncio.run(evaluate("b", 99))
    assert starts == [4, 9] and [(*m[:3], m[3].task, m[3].finish) for m in sent] == [
        ("evaluated", 0, 2, "a", "submitted"), ("evaluated", 0, 2, "b", "void:start")]


def figures(lines, runs):
    """The table from rollouts.jsonl, by hand: mean, stderr, pass@k by trying all choices of k runs, ends, pass rates, void."""
    rewards = {}
    for line in lines:
        rewards.setdefault(line["task"], {})[line["run"]] = line["reward"]
    assert all(set(of_task) == set(range(runs)) for of_task in rewards.values())
    means = [statistics.mean(of_task[run] for of_task in rewards.values()) for run in range(runs)]
    passed = lambda of_task, chosen: any(of_task[run] >= 1 for run in chosen)
    pass_at = {k: statistics.mean(statistics.mean(passed(of_task, chosen) for chosen in itertools.combinations(range(runs), k))
                                  for of_task in rewards.values()) for k in range(1, runs + 1)}
    ends = [line["finish"] for line in lines]
    return dict(mean=statistics.mean(means), stderr=statistics.stdev(means) / math.sqrt(runs) if runs > 1 else None, run_means=means,
                pass_at_k=pass_at, finish={end: ends.count(end) for end in ends},
                rates={name: statistics.mean(x >= 1 for x in of_task.values()) for name, of_task in rewards.items()},
                void={line["task"] for line in lines if line["finish"].startswith("void")})


def compare(scores, wanted):
    """Scores of tmax.score, maybe through JSON, with `figures`."""
    assert scores["mean"] == pytest.approx(wanted["mean"]) and scores["run_means"] == pytest.approx(wanted["run_means"])
    assert scores["stderr"] == (wanted["stderr"] and pytest.approx(wanted["stderr"]))
    assert {int(k): p for k, p in scores["pass_at_k"].items()} == pytest.approx(wanted["pass_at_k"])
    assert scores["finish"] == wanted["finish"] and set(scores["void"]) == wanted["void"]
    assert {t["task"]: t["pass_rate"] for t in scores["tasks"]} == wanted["rates"]


@pytest.mark.parametrize("runs", [1, 2, 3, 5])
def test_scores(runs):
    """Figures of random results with partial rewards and void rollouts; no error bar from one run."""
    draw = random.Random(runs)
    results = [[tmax.Rollout(f"t{i}", [], [], [], [], 0, finish=draw.choice(["submitted", "max_steps"]), reward=draw.choice([0, 0.5, 1, 1]))
                for _ in range(runs)] for i in range(12)]
    results[3][0] = tmax.Rollout("t3", [], [], [], [], 0, finish="void:start")
    lines = [dict(task=r.task, run=run, reward=r.reward, finish=r.finish) for of_task in results for run, r in enumerate(of_task)]
    compare(tmax.score(results), figures(lines, runs))


@pytest.fixture(scope="session")
def evaluation(tiny_run, held_out):
    """(run folder, what was printed) of --eval with the trained model; sampling as in training, so that runs differ; one task cannot start."""
    folder, tasks = tiny_run.parents[1], tiny_run.parents[1] / "tasks"
    shutil.copytree(held_out, tasks)
    make_task(tasks / "never", toml="[environment]\nmemory_mb = 1\n", seeds={"large": "x" * (4 << 20)})
    run = start_run(folder, "--name", "eval", "--eval", "--model", str(tiny_run / "checkpoint-6"), "--tasks", str(tasks),
                    "--temperature", "1", "--top_p", "1")
    assert run.wait(300) == 0, last_line(folder, "eval")
    return folder / "runs/eval", (folder / "log-eval").read_text()


def test_printed_table_equals_the_transcripts(evaluation):
    """Every figure of the table and of eval.json, recomputed from rollouts.jsonl; the task that stays void counts 0 and is named."""
    folder, said = evaluation
    lines = [json.loads(line) for line in (folder / "rollouts.jsonl").open()]
    assert len(lines) == 5 * 3
    wanted, scores = figures(lines, 3), json.loads((folder / "eval.json").read_text())
    compare(scores, wanted)
    assert wanted["void"] == {"never"} and wanted["rates"]["never"] == 0 and "counted as 0: never\n" in said
    assert f"5 tasks / {100 * wanted['mean']:.1f} ± {100 * wanted['stderr']:.1f} % over 3 runs" in said
    assert "  ".join(f"pass@{k} {100 * p:.1f} %" for k, p in wanted["pass_at_k"].items()) in said
    assert "ends: " + ", ".join(f"{n} {end}" for end, n in sorted(wanted["finish"].items())) in said
    for name, rate in wanted["rates"].items():
        ends = [line["finish"] for line in sorted(lines, key=lambda line: line["run"]) if line["task"] == name]
        assert re.search(rf"^{name} +{rate:.2f}  {', '.join(ends)}$", said, re.M)
    for line in lines:      # the tests ran, whatever the end, and their reward is the one that counts
        assert line["finish"].startswith("void") or line["transcript"][-1]["role"] == "verifier"
        assert line["versions"] in ([0], []) and "no_call" not in line["finish"]


def test_evaluation_during_training(tiny_run, metrics, rollout_lines):
    """Every third step: figures in metrics.jsonl, on the weights of that step's checkpoint; the best one is linked."""
    evaluated = [m for m in metrics if "eval_mean" in m]
    assert [m["step"] for m in evaluated] == [3, 6]
    for m in evaluated:
        lines = [line for line in rollout_lines if line["step"] == m["step"] and "run" in line]
        wanted = figures(lines, 2)
        assert (m["eval_mean"], m["eval_stderr"], m["eval_void"]) == (pytest.approx(wanted["mean"]), pytest.approx(wanted["stderr"]), [])
        assert all(line["versions"] == [m["version"]] for line in lines) and (tiny_run / f"checkpoint-{m['step']}").is_dir()
    best = max(evaluated, key=lambda m: m["eval_mean"])
    assert os.readlink(tiny_run / "checkpoint-best") == f"checkpoint-{best['step']}"
    assert f"checkpoint-best -> checkpoint-{best['step']}" in (tiny_run.parents[1] / "log-e2e").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Model families: stop tokens, packed logprobs, the engine, and what is refused
# ---------------------------------------------------------------------------------------------------------------------

def test_turns_end_with_any_end_token(tmp_path):
    """Stop ids: the tokenizer's eos, generation_config's and the template's. A turn that ends otherwise than in the template
    is closed as there, by a token that is not trained on; nothing that was sampled leaves."""
    small_tokenizer(LLAMA, LLAMA_TOKENS, "<|end_of_text|>").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    python, text, turn = (tokenizer.convert_tokens_to_ids(t) for t in ("<|python_tag|>", "<|end_of_text|>", "<|eot_id|>"))
    assert set(tmax.ChatFormat(tokenizer).stop_ids) == {text, turn}
    for listed, stop_ids in [(python, {text, turn, python}), ([text, turn, python], {text, turn, python}), (None, {text, turn})]:
        GenerationConfig(eos_token_id=listed).save_pretrained(tmp_path)
        chat = tmax.ChatFormat(tokenizer)
        assert set(chat.stop_ids) == stop_ids and len(chat.stop_ids) == len(stop_ids)
    for role in ("tool", "user"):
        plain = chat.tool_turn(["output"], role)
        assert turn not in plain[:1] and chat.tool_turn(["output"], role, stop=turn) == plain
        assert chat.tool_turn(["output"], role, stop=text) == [turn] + plain
    engine = Script(tokenizer, hermes("touch /tmp/done"), hermes(SUBMIT))       # it ends its turns with <|end_of_text|>
    task = tmax.load_task(make_task(tmp_path / "t", test=f"[ -e /tmp/done ] && echo 1 >{TXT}"))
    r = asyncio.run(tmax.rollout(engine, task, tokenizer, CFG))
    assert (r.finish, r.reward) == ("submitted", 1.0) and r.transcript[0]["content"] == hermes("touch /tmp/done")
    ended = r.prompt_tokens + len(engine.sampled[0])
    assert r.tokens[ended - 1:ended + 1] == [text, turn] and r.mask[ended - 1:ended + 1] == [1, 0]


FAMILY = {"qwen3": (QWEN, QWEN_TOKENS, "<|im_end|>"), "qwen2": (QWEN, QWEN_TOKENS, "<|im_end|>"), "llama": (LLAMA, LLAMA_TOKENS, "<|eot_id|>")}
SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
             initializer_range=0.2, max_position_embeddings=2048, bos_token_id=None)


@pytest.fixture(scope="session", params=FAMILY)
def family_model(request, tmp_path_factory):
    """A folder with a random model and a template of the family; Qwen2's embeddings are tied, as its small ones are."""
    folder, tokenizer = tmp_path_factory.mktemp(request.param), small_tokenizer(*FAMILY[request.param])
    torch.manual_seed(4)
    config = AutoConfig.for_model(request.param, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
                                  pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=request.param == "qwen2", **SHAPE)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_families_train(family_model):
    """From a folder to logprobs: packed as the learner computes them, against each rollout alone with ordinary attention."""
    tmax.check_model(family_model, CFG)
    policy = tmax.load_policy(family_model, CFG, sharded=False)
    chat, draw = tmax.ChatFormat(AutoTokenizer.from_pretrained(family_model)), random.Random(5)
    rollouts = []
    for name in ("a", "b", "c"):
        r = tmax.Rollout(name, [], [], [], [], 0)
        r.append(chat.prompt(f"Do {name}."), 0)
        for _ in range(2):
            r.append([draw.randrange(300) for _ in range(20)] + chat.stop_ids, 1)
            r.append(chat.tool_turn(["output"]), 0)
        rollouts.append(r)
    with torch.no_grad():
        found = policy.run(tmax.build_pack(rollouts))[0]
        wanted = torch.cat([unpacked_logprobs(ordinary(policy.lm), r) for r in rollouts])
    assert (found - wanted).abs().max() <= 1e-5 and wanted.std() > 0.5


def sampled_gap(folder):
    """Largest |log mu - log pi| of some turns that a real engine samples from a model."""
    prompts = [[token % 300 for token in PROMPT[:20 + i]] for i in range(8)]    # the smallest vocabulary has a few more

    async def turns():
        engine = tmax.Engine(folder, HOT)
        try:
            await engine.llm.update_weight_version("0")
            return await asyncio.gather(*[engine.generate(prompt, 64, []) for prompt in prompts])
        finally:
            engine.llm.shutdown(timeout=0)
    return max(float((learner_logprobs(folder, turn, prompt) - torch.tensor(turn.logprobs)).abs().max())
               for prompt, turn in zip(prompts, asyncio.run(turns())))


@pytest.mark.slow
def test_families_sample(family_model):
    """vLLM and the learner agree to 1e-4 in fp32 for every family."""
    assert in_fresh_process(sampled_gap, family_model) <= 1e-4


@pytest.mark.parametrize("family, changes, reason", [
    ("qwen3", {}, None), ("qwen2", {}, None), ("llama", {}, None), ("llama", dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=2.0)), None),
    ("mistral", dict(sliding_window=None), None), ("phi3", dict(sliding_window=262144), None),
    ("granite", dict(logits_scaling=1.0), None),
    ("qwen3_5", {}, "linear_attention"), ("qwen3_5_text", {}, "linear_attention"), ("qwen3_next", {}, "linear_attention"),
    ("mamba", {}, "linear_attention"), ("jamba", {}, "linear_attention"), ("rwkv", {}, "packed attention"),
    ("lfm2", dict(layer_types=["conv", "full_attention"], num_hidden_layers=2), "conv"),
    ("mistral", {}, "sliding_attention"), ("phi3", dict(sliding_window=2048), "sliding_attention"),
    ("qwen2", dict(use_sliding_window=True, max_window_layers=1), "sliding_attention"),
    ("gemma2", {}, "sliding_attention"), ("gpt_oss", {}, "sliding_attention"), ("llama4_text", {}, "chunked_attention"),
    ("qwen2_5_vl", {}, "multimodal"), ("t5", {}, "encoder-decoder"), ("bart", {}, "encoder-decoder"), ("vit", {}, "no causal"),
    ("granite", dict(logits_scaling=8.0), "scales"), ("cohere", {}, "scales"),
    ("llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), "dynamic"),
    ("mixtral", dict(sliding_window=None), "other names"), ("qwen3_moe", {}, "other names"), ("phi", {}, "bias"), ("gpt2", {}, "no decoder of layers"),
])
def test_models_that_cannot_be_packed_are_refused(tmp_path, family, changes, reason):
    """From config.json alone, before anything is loaded, in one line that says why."""
    AutoConfig.for_model(family, **changes).save_pretrained(tmp_path)
    if reason is None:
        assert tmax.check_model(tmp_path, CFG).config.model_type == family
        return
    with pytest.raises(tmax.UserError, match=f"--model: .*{reason}") as error:
        tmax.check_model(tmp_path, CFG)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, value", [("softcap", 50.0), ("s_aux", torch.zeros(2)), ("sliding_window", 7), ("dropout", 0.1)])
def test_attention_of_another_kind_is_an_error(name, value):
    """What packed attention does not compute, it does not ignore; what is off, or no shorter than the row, changes nothing."""
    q, k, v = torch.randn(3, 1, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    attend = lambda **more: tmax.packed_attention(None, q, k, v, None, cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32), **more)[0]
    with pytest.raises(ValueError, match=name):
        attend(**{name: value})
    assert attend(softcap=None, dropout=0.0, sliding_window=8, use_cache=False, position_ids=torch.arange(8)).equal(attend())


# ---------------------------------------------------------------------------------------------------------------------
# Serving
# ---------------------------------------------------------------------------------------------------------------------

def test_checkpoint_keeps_dtype_and_generation_config(tiny_model, tmp_path, process_group):
    """A bf16 run saves bf16 weights that are the masters rounded, and a generation config even if transformers finds it odd."""
    learner = tmax.Learner(dataclasses.replace(TINY, dtype="bfloat16"), tiny_model[0], ALONE)
    learner.policy.lm.generation_config.temperature = 0.6       # without do_sample
    learner.save_checkpoint(tmp_path / "checkpoint-1", AutoTokenizer.from_pretrained(tiny_model[0]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1", dtype="auto")
    masters = AutoModelForCausalLM.from_pretrained(tiny_model[0]).bfloat16().state_dict()
    assert saved.dtype == torch.bfloat16 and all(x.equal(masters[name]) for name, x in saved.state_dict().items())
    written = json.loads((tmp_path / "checkpoint-1/generation_config.json").read_text())
    assert (written["temperature"], written["eos_token_id"]) == (0.6, AutoTokenizer.from_pretrained(tmp_path / "checkpoint-1").eos_token_id)


def test_checkpoint_serves(tiny_run, tmp_path):
    """vLLM's OpenAI server on the trained checkpoint answers a chat request with a parsed call of bash."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20), "--enable-auto-tool-choice",
             "--tool-call-parser", "hermes", "--host", "127.0.0.1", "--port", str(port)]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen([sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_run / "checkpoint-6"), *flags],
                              stdout=log, stderr=log, cwd=tmp_path, start_new_session=True,
                              env=os.environ | {"TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TMAX_MARK": MARK, "TMPDIR": str(tmp_path)})

    def ask(path, data=None):
        with contextlib.suppress(urllib.error.URLError):
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data and json.dumps(data).encode(),
                                             {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read() or b"{}"
    try:
        wait_for(lambda: server.poll() is not None or ask("/health"), 240)
        messages = [{"role": "system", "content": tmax.SYSTEM_PROMPT}, {"role": "user", "content": "Write the word amber to the file /workspace/fern"}]
        answer = ask("/v1/chat/completions", dict(model=str(tiny_run / "checkpoint-6"), messages=messages, tools=[tmax.BASH_TOOL],
                                                  tool_choice="auto", temperature=0, max_tokens=64))
        assert answer, (tmp_path / "log").read_text()[-2000:]
        choice = json.loads(answer)["choices"][0]
        call, = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls" and call["function"]["name"] == "bash"
        assert json.loads(call["function"]["arguments"])["command"].startswith(("echo", "mv", "cat", "touch"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


if __name__ == "__main__":      # a rank of test_updates_do_not_depend_on_ranks_and_nodes
    updates_of_a_rank(Path(sys.argv[1]), tmax.join_ranks())
