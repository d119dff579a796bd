"""Tests of tmax.py: the algorithm against independent references, harness and sandbox, a real engine, whole tiny runs.

    bash run.sh test               the default suite
    bash run.sh test -m slow       learning with three seeds
    bash run.sh test -m bench -s   benchmarks: they print, they assert nothing about time
    bash run.sh test -m gpu        checks that need a CUDA device (vLLM not needed)
"""
import asyncio
import contextlib
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

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

CFG = tmax.Config(loss="dppo_tv")


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


# ---------------------------------------------------------------------------------------------------------------------
# One real engine for these tests, in this process; and a whole tiny run, in processes of its own
# ---------------------------------------------------------------------------------------------------------------------

TINY = tmax.Config(**tmax.TINY)
MARK = f"tmax-test-{os.getpid()}"      # in the environment of everything that a test starts


def ours():
    """Command lines of what tests have started and is still alive; sandboxes have an environment of their own."""
    alive = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes()
            if int(process.name) != os.getpid() and (f"TMAX_MARK={MARK}".encode() in (process / "environ").read_bytes()
                                                     or b"/dev/shm/.shell" in command):
                alive.append(command[:100])
    return alive


def debris():
    """What a run could leave behind: processes, shared memory, mounts, temporary files."""
    names = lambda folder: set(os.listdir(folder))
    return ours(), names("/dev/shm"), len(Path("/proc/mounts").read_text().splitlines()), names(tempfile.gettempdir())


def wait_for(condition, seconds=120):
    """Wait until condition() is true; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def start_run(folder, *flags):
    """`python tmax.py --tiny …` in an empty folder, as a user starts it."""
    log = (folder / f"log-{flags[1]}").open("w")
    return subprocess.Popen([sys.executable, tmax.__file__, "--tiny", *flags], cwd=folder, stdout=log, stderr=log,
                            env=os.environ | {"TMAX_MARK": MARK})


def last_line(folder, name):
    return (folder / f"log-{name}").read_text().splitlines()[-1]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a short tiny run: run folder, tasks, warm-started model, checkpoint, metrics, transcripts."""
    folder = tmp_path_factory.mktemp("e2e")
    before = debris()
    run = start_run(folder, "--name", "e2e", "--training_steps", "6", "--prompts_per_step", "8")
    assert run.wait(600) == 0, last_line(folder, "e2e")
    assert debris() == before
    return folder / "runs/e2e"


@pytest.fixture(scope="session")
def metrics(tiny_run):
    return [json.loads(line) for line in (tiny_run / "metrics.jsonl").open()]


@pytest.fixture(scope="session")
def transcripts(tiny_run):
    return [json.loads(line) for line in (tiny_run / "rollouts.jsonl").open()]


def test_metrics_have_the_agreed_keys(metrics):
    """One object a step, with the keys that forks and plots rely on."""
    keys = set("""step reward groups_kept groups_zero_spread groups_stale rollouts_void tokens loss grad_norm kept_fraction
                  mismatch_max drift_max entropy staleness_max seconds_generate seconds_train seconds_reload""".split())
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
    assert not {t.instruction for t in tasks} & {instruction for instruction, _ in demonstrations}


def test_checkpoint_is_a_hugging_face_folder(tiny_run):
    """Model and tokenizer load by transformers, with the chat template, and the weights have moved."""
    checkpoint = tiny_run / "checkpoint-6"
    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in (tiny_run / "model", checkpoint))
    assert any((a != b).any() for a, b in zip(before.parameters(), after.parameters()))
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template
    assert not list(tiny_run.glob("*.partial"))


@pytest.mark.parametrize("victim", ["learner", "generator", "interrupt"])
def test_killed_run_leaves_nothing(tiny_run, tmp_path, victim):
    """SIGKILL of the learner, of the generator, or Ctrl-C: everything ends soon, metrics so far can be read."""
    before = debris()
    flags = ("--model", str(tiny_run / "model"), "--tasks", str(tiny_run / "tasks"), "--prompts_per_step", "2")
    run = start_run(tmp_path, "--name", victim, *flags)
    steps = tmp_path / f"runs/{victim}/metrics.jsonl"
    wait_for(lambda: steps.exists() and steps.stat().st_size)
    if victim == "learner":
        run.kill()
    elif victim == "interrupt":
        run.send_signal(signal.SIGINT)
    else:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        generator, = (int(p) for p in children if os.getpgid(int(p)) == int(p))
        os.kill(generator, signal.SIGKILL)
    assert run.wait(60) != 0
    wait_for(lambda: debris() == before, 30)
    assert all(json.loads(line)["step"] for line in steps.open())
    if victim == "generator":
        assert last_line(tmp_path, victim).startswith("error: generator:")


class InThisProcess:
    """A real engine on an event loop in a thread; `call` runs a coroutine there."""

    def __init__(self, model):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.engine = self.call(self._make(model))

    async def _make(self, model):
        engine = tmax.Engine(model, TINY)
        await engine.llm.update_weight_version("0")
        return engine

    def call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(300)


@pytest.fixture(scope="session")
def live(tiny_run, tmp_path_factory):
    """(engine in this process, two weight folders: the warm-started model's and the trained one's)."""
    threads = torch.get_num_threads()
    live = InThisProcess(tiny_run / "model")
    torch.set_num_threads(threads)
    yield live
    live.engine.llm.shutdown(timeout=0)


def learner_logprobs(folder, turn, prompt):
    """Logprobs of a turn by the learner's own path: Policy over a pack."""
    r = tmax.Rollout("t", [], [], [], [], len(prompt))
    r.append(prompt, 0)
    r.append(turn.tokens, 1, turn.logprobs, turn.versions)
    with torch.no_grad():
        return tmax.load_policy(folder, TINY, "cpu", sharded=False).run(tmax.build_pack([r]))[0]


PROMPT = list(range(300, 340))


def test_logprobs_match_before_and_after_a_reload(live, tiny_run):
    """mismatch <= 1e-4 in fp32 under the first weights, under new ones, and under the first again."""
    for version, folder in enumerate([tiny_run / "model", tiny_run / "checkpoint-6", tiny_run / "model"]):
        if version:
            live.call(live.engine.reload(folder, version))
        turn = live.call(live.engine.generate(PROMPT, 64, []))
        assert len(turn.tokens) == 64 and turn.cut and set(turn.versions) == {version}
        gap = learner_logprobs(folder, turn, PROMPT) - torch.tensor(turn.logprobs)
        assert gap.abs().max() <= 1e-4


def test_rollout_in_flight_goes_on_under_new_weights(live, tiny_run):
    """A turn that spans a reload has tokens of two versions, each with the logprobs of its own weights."""
    async def both():
        request = asyncio.create_task(live.engine.generate(PROMPT, 256, []))
        await asyncio.sleep(0.3)
        await live.engine.reload(tiny_run / "checkpoint-6", 7)
        return await request
    live.call(live.engine.reload(tiny_run / "model", 6))
    turn = live.call(both())
    assert set(turn.versions) == {6, 7} and turn.versions == sorted(turn.versions)
    old = np.array(turn.versions) == 6
    theirs = np.array(turn.logprobs)
    assert np.abs(learner_logprobs(tiny_run / "model", turn, PROMPT).numpy() - theirs)[old].max() <= 1e-4
    assert np.abs(learner_logprobs(tiny_run / "checkpoint-6", turn, PROMPT).numpy() - theirs)[~old].max() <= 1e-4


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
    assert all((v >= 0) == bool(m) == (p != 0) or p == 0 for m, v, p in zip(r.mask, r.versions, r.logprobs))


def test_long_prompts_are_dropped_and_counted(tiny_run, tmp_path):
    """A task over --max_prompt_tokens is never rolled out; if all are, the run says so."""
    prompt = len(tmax.chat_format(AutoTokenizer.from_pretrained(tiny_run / "model")).prompt("short"))
    for name, words in (("long", 400), ("short", 1)):
        for part in ("tests", "environment"):
            (tmp_path / "tasks" / name / part).mkdir(parents=True)
        (tmp_path / "tasks" / name / "instruction.md").write_text("short " * words)
        (tmp_path / "tasks" / name / "tests/test.sh").write_text("echo $RANDOM >/logs/verifier/reward.txt")
    flags = ("--model", str(tiny_run / "model"), "--prompts_per_step", "1", "--training_steps", "1")
    run = start_run(tmp_path, "--name", "some", *flags, "--tasks", str(tmp_path / "tasks"))
    assert run.wait(200) == 0, last_line(tmp_path, "some")
    assert json.loads((tmp_path / "runs/some/metrics.jsonl").read_text())["prompts_too_long"] == 1
    run = start_run(tmp_path, "--name", "none", *flags, "--tasks", str(tmp_path / "tasks/long"))
    assert run.wait(200) == 1 and last_line(tmp_path, "none").startswith("error: --max_prompt_tokens")
    assert prompt < TINY.max_prompt_tokens


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_reward_rises(tmp_path, seed):
    """The tiny recipe learns, with any seed: from at most 0.5 to at least 0.8, by at least 0.35."""
    run = start_run(tmp_path, "--name", "learn", "--seed", str(seed))
    assert run.wait(1800) == 0, last_line(tmp_path, "learn")
    rewards = [json.loads(line)["reward"] for line in (tmp_path / "runs/learn/metrics.jsonl").open()]
    first, last = np.mean(rewards[:5]), np.mean(rewards[-5:])
    assert 0.2 <= first <= 0.5 and last >= 0.8 and last - first >= 0.35
