"""The command line: ``fastllm doctor``, ``fastllm patch``, ``fastllm context``, ``fastllm plan``, ``fastllm train`` and
``fastllm stream``."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import socket
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from fastllm import __version__
from fastllm.errors import ConfigError, FastLLMError

_FIRST_SPEAKS = 5.0  # seconds


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} -h)\n")


class _WronglyCalled(Exception):
    """Its cause is an error in what the command was given."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 success, 1 it failed, 2 it was called wrongly."""
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        key, _, value = unknown[0].lstrip("-").partition("=")
        written = f"; a key of a configuration is written {key.replace('-', '_')}={value or 'VALUE'}"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{written if arguments.command == 'train' else ''}")
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` say, has read enough; nothing more can be said, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as raised:
        if arguments.debug:
            raise
        error = raised.__cause__ if isinstance(raised, _WronglyCalled) else raised
        said = (str(error).strip().splitlines() or [""])[0]
        if not said or not isinstance(error, (FastLLMError, ValueError, TypeError, OSError)):
            said = f"{type(error).__name__}: {said} (--debug shows where)"  # not an error meant for a user
        said = _of_several(error, said)
        print(f"fastllm {arguments.command}: error: {said}", file=sys.stderr)
        return 2 if isinstance(raised, _WronglyCalled) else 1


def _of_several(error: BaseException | None, said: str) -> str:
    """What one of a run's processes says of an error. What all have met the first one of a machine says: the launcher ends the others
    for it before they come to speak."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return said
    from fastllm.train import together

    if together.is_lost(error):
        said = "another process of the run has ended; what it or the launcher says tells why"
    elif isinstance(error, FastLLMError) and not error.alone:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            return said
        time.sleep(_FIRST_SPEAKS)
    return f"process {os.environ.get('RANK', '?')} on {socket.gethostname()}: {said}"


def _parser() -> _Parser:
    parser = _Parser(
        prog="fastllm",
        description="Fused kernels and length extrapolation for LLMs: look at this machine, at what a patch would change in a "
        "model, or at how far it reads; train one, or let it talk for ever.",
    )
    parser.add_argument("--version", action="version", version=f"fastllm {__version__}")
    shared = _Parser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print JSON for a program to read")
    shared.add_argument("--debug", action="store_true", help="on an error, print the traceback")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    doctor = commands.add_parser(
        "doctor",
        parents=[shared],
        help="versions, backends, what is missing and how to mend it, two measured numbers",
        description="Prints the versions found, the CPU and GPUs, each backend with the reason and the remedy where it "
        "is missing, and this machine's copy bandwidth and matmul rate as just measured. Takes a few seconds.",
    )
    doctor.add_argument("--no-measure", action="store_true", help="leave out the two measurements")
    doctor.set_defaults(run=_doctor)

    patch = commands.add_parser(
        "patch",
        parents=[shared],
        help="what fastllm.patch would change in a model, and what it would leave and why",
        description="Builds the model from its configuration alone, without weights, patches it with verification and "
        "prints the report. Nothing is written; to train with the patch, call fastllm.patch(model) in your script. "
        "Exit code 1 when nothing could be patched.",
    )
    patch.add_argument(
        "model",
        metavar="MODEL",
        help="a folder with a config.json, such a file, a model type of transformers (llama, qwen3, gemma3_text, ...; "
        "its default sizes are taken) or ORGANISATION/NAME on the Hugging Face Hub (only the configuration is fetched)",
    )
    patch.add_argument("--dry-run", action="store_true", help="required: this command only ever looks")
    patch.add_argument("--ops", metavar="OP[,OP...]", help="only these ops; default: all")
    patch.add_argument("--exclude", metavar="OP|GLOB[,...]", help="ops or module paths to leave alone")
    patch.set_defaults(run=_patch)

    context = commands.add_parser(
        "context",
        parents=[shared],
        help="how far a model reads, and what takes it further",
        description="Reads a model's configuration and says what the scaling laws of RoPE predict: how far it reads as it is, which "
        "method takes it to the target, with which parameters, and up to where. Nothing is written.",
    )
    context.add_argument("model", metavar="MODEL", help="as for fastllm patch")
    context.add_argument("--target", type=int, required=True, metavar="N", help="tokens to read")
    context.set_defaults(run=_context)

    plan = commands.add_parser(
        "plan",
        parents=[shared],
        help="what training a model takes: memory of each GPU under ZeRO 0 to 3 and offload, time, and what fits",
        description="Reads a model's configuration and simulates a training step without weights: parameters, gradients, optimizer "
        "and activations, with and without checkpointing and fused kernels, for each way to share them. Nothing is written.",
    )
    plan.add_argument("--model", required=True, metavar="MODEL", help="as for fastllm patch")
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="data-parallel; default: 1")
    plan.add_argument("--gpu-memory", metavar="SIZE", help="of each, in GB, or 80GiB say: tells what fits")
    plan.add_argument("--seq", type=int, default=2048, metavar="L", help="tokens of a row; default: 2048")
    plan.add_argument("--batch", type=int, default=1, metavar="B", help="rows of a micro batch on a GPU; default: 1")
    plan.add_argument("--accumulation", type=int, default=1, metavar="N", help="micro batches of a step; default: 1")
    plan.add_argument("--lora", type=int, metavar="R", help="train adapters of this rank on every linear layer")
    plan.add_argument("--optimizer", default="adamw", choices=["adamw", "adamw8bit"], help="default: adamw")
    plan.add_argument(
        "--precision", default="bf16", choices=["bf16", "fp32", "autocast", "pure-bf16"],
        help="bf16 as DeepSpeed has it, with a master copy in fp32 (default); fp32; autocast: fp32 weights, bf16 products; pure-bf16: "
        "weights, gradients and moments in bf16, no copy",
    )  # fmt: skip
    plan.add_argument("--device", metavar="NAME", help="a GPU whose peak is known: A100, H100, H200, B200, MI300X")
    plan.add_argument("--mfu", metavar="SHARE|RUN", help="share of the peak, or a run's folder that has measured it")
    plan.add_argument("--link", metavar="SIZE", help="GB a second between GPUs, for ZeRO-3's traffic")
    plan.add_argument("--no-patch", action="store_true", help="plan without fastllm's kernels")
    plan.set_defaults(run=_plan)

    train = commands.add_parser(
        "train",
        parents=[shared],
        help="train or tune a model on files of text, conversations or preferences",
        description="Trains as a YAML file says. Every key of transformers.TrainingArguments may stand in it, beside those that "
        "docs/training.md lists. The same file runs on many GPUs: deepspeed --module fastllm.train CONFIG, or torchrun -m "
        "fastllm.train CONFIG. Checkpoints, metrics and the model go into a folder of their own under output_dir.",
    )
    train.add_argument(
        "config",
        metavar="CONFIG",
        help="a YAML file, or an example that comes with fastllm: pretrain, sft, mixed, rm, dpo, ppo, ...",
    )
    train.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],
        help="put over the file's; rope.method=yarn reaches inside",
    )
    train.set_defaults(run=_train)

    stream = commands.add_parser(
        "stream",
        parents=[shared],
        help="a model talks in the terminal, for ever if it is let, in constant memory",
        description="Loads a model and goes on from --prompt, or with --chat answers line by line, on one StreamingCache: memory and "
        "time per token do not grow. In a terminal the last row shows tokens per second, memory and evictions. Ctrl-C ends it.",
    )
    stream.add_argument(
        "model",
        metavar="MODEL",
        help="a folder with weights and a tokenizer, or ORGANISATION/NAME on the Hugging Face Hub",
    )
    stream.add_argument("--prompt", metavar="TEXT", help="what the text begins with; with --chat, the system's message")
    stream.add_argument("--chat", action="store_true", help="a conversation: one line of input, one answer")
    stream.add_argument("--tokens", type=int, metavar="N", help="end after N tokens (of each answer); default: never")
    stream.add_argument("--sinks", type=int, default=4, metavar="S", help="first tokens that stay visible; default: 4")
    size = stream.add_mutually_exclusive_group()
    size.add_argument("--window", type=int, metavar="W", help="tokens of the window; default: 1024 with the sinks")
    size.add_argument("--memory", metavar="SIZE", help='the largest window whose cache fits into SIZE, "2GiB" say')
    stream.add_argument(
        "--kv-dtype", choices=["int8", "fp8"], help="keys and values in 8 bits; default: as the weights"
    )
    stream.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest token; default: 0.8"
    )
    stream.add_argument("--top-p", type=float, default=0.95, metavar="P", help="nucleus sampling; default: 0.95")
    stream.add_argument("--seed", type=int, metavar="N", help="of the sampling")
    stream.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="default: the weights' own"
    )
    stream.add_argument("--no-patch", action="store_true", help="run the model without fastllm's kernels")
    stream.set_defaults(run=_stream)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    from fastllm import doctor

    report = doctor.collect(measure=not arguments.no_measure)
    print(json.dumps(report, indent=2) if arguments.json else doctor.render(report))
    return 0


def _patch(arguments: argparse.Namespace) -> int:
    if not arguments.dry_run:
        print(
            "fastllm patch: error: fastllm.patch(model) patches, in Python; with --dry-run this shows what it would do",
            file=sys.stderr,
        )
        return 2
    import fastllm
    from fastllm.patching.patch import OPS

    asked = [op for op in (arguments.ops or "auto").split(",") if op]
    if unknown := [op for op in asked if op not in ("auto", *OPS)]:
        print(f"fastllm patch: error: --ops knows {', '.join(OPS)}, not {unknown[0]!r}", file=sys.stderr)
        return 2
    model = _without_weights(_configuration(arguments.model))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        report = fastllm.patch(model, asked, exclude=[e for e in (arguments.exclude or "").split(",") if e])
    for warning in warned:
        if str(warning.message).startswith("exclude"):  # "changed nothing" is said below
            print(f"fastllm patch: warning: {warning.message}", file=sys.stderr)
    parameters = sum(p.numel() for p in model.parameters())
    if arguments.json:
        found = {
            "model": report.model,
            "parameters": parameters,
            "counts": report.counts,
            "patched": [asdict(record) for record in report.patched],
            "skipped": [asdict(record) for record in report.skipped],
        }
        print(json.dumps(found, indent=2))
    else:
        print(f"{report.model}, {parameters / 1e6:,.0f} million parameters, built without weights\n\n{report}")
    if not report.patched:
        print(f"fastllm patch: error: nothing in {report.model} was patched", file=sys.stderr)
    return 0 if report.patched else 1


def _context(arguments: argparse.Namespace) -> int:
    from fastllm.rope import laws

    config = _configuration(arguments.model)
    found = laws.recommend(config, arguments.target)
    refused = _refused(config, found) if found.command else None
    if arguments.json:
        print(json.dumps(asdict(found) | {"refused": refused}, indent=2))
    else:
        print(f"{found}\n\n{_wavelengths(found)}")
    if refused:
        print(f"fastllm context: error: extend_context does not do it: {refused}", file=sys.stderr)
    return 1 if refused else 0


def _refused(config: Any, found: Any) -> str | None:
    """What extend_context has against the recommended command, tried on the model without weights; None where it does it."""
    import fastllm

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            fastllm.extend_context(_without_weights(config), found.target_length, found.method, **found.params)
    except FastLLMError as error:
        return str(error)
    return None


def _plan(arguments: argparse.Namespace) -> int:
    try:
        config = _configuration(arguments.model)
        from fastllm.train import plan_report
        from fastllm.train.plan import memory

        found = memory(
            config, gpus=arguments.gpus, seq=arguments.seq, batch=arguments.batch, accumulation=arguments.accumulation,
            gpu_memory=arguments.gpu_memory and plan_report.bytes_of(arguments.gpu_memory, "--gpu-memory"),
            precision=arguments.precision, optimizer=arguments.optimizer, lora=arguments.lora, device=arguments.device,
            mfu=arguments.mfu and plan_report.mfu_of(arguments.mfu), patch=not arguments.no_patch,
            link=arguments.link and plan_report.bytes_of(arguments.link, "--link"),
        )  # fmt: skip
    except ConfigError as error:
        raise _WronglyCalled from error
    print(plan_report.as_json(found) if arguments.json else plan_report.render(found))
    return 0


def _train(arguments: argparse.Namespace) -> int:
    try:
        import datasets  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"this needs {error.name}: pip install 'fastllm[train]'") from None
    from fastllm.train import command

    try:
        run = command.prepare(arguments.config, arguments.overrides)
    except FastLLMError as error:
        raise _WronglyCalled from error
    command.finish(run, as_json=arguments.json)
    return 0


def _stream(arguments: argparse.Namespace) -> int:
    import io

    try:
        from fastllm.streaming import console
    except ImportError:
        raise ConfigError("this needs transformers: pip install 'transformers>=5.0'") from None
    out = io.StringIO() if arguments.json else sys.stdout
    found = console.stream(
        arguments.model, prompt=arguments.prompt, sinks=arguments.sinks, window=arguments.window, memory=arguments.memory,
        count=arguments.tokens, temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed,
        dtype=arguments.dtype, kv_dtype=arguments.kv_dtype, patch=not arguments.no_patch, chat=arguments.chat, out=out,
        say=sys.stderr, lines=sys.stdin,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps({"text": out.getvalue(), **asdict(found)}, indent=2))  # type: ignore[union-attr]
    else:
        print(found, file=sys.stderr)
    return 0


def _wavelengths(found: Any) -> str:
    """The wavelength of every pair of dimensions (at most 16 of them) against the trained length, as bars."""
    import math

    pairs = found.head_dim // 2
    shown = sorted({round(n * (pairs - 1) / min(15, max(1, pairs - 1))) for n in range(min(16, pairs))})
    waves = {pair: 2 * math.pi * found.base ** (2 * pair / found.head_dim) for pair in shown}
    longest = max(*waves.values(), found.target_length, found.bound or 0)
    columns = 60

    def column(tokens: float) -> int:
        return round(columns * math.log(max(tokens, 6)) / math.log(longest))

    marks = {
        column(found.bound or found.target_length): "B",
        column(found.target_length): "T",
        column(found.trained_length): "|",
    }
    lines = ["wavelengths in tokens, on a logarithmic scale: | trained length, T target, B predicted bound"]
    for pair, wave in waves.items():
        bar = "".join(marks.get(c) or ("=" if c <= column(wave) else " ") for c in range(columns + 1)).rstrip()
        lines.append(f"  pair {pair:>3} {wave:>12,.0f} {bar}")
    return "\n".join(lines)


def _configuration(name: str) -> Any:
    """The transformers configuration behind the MODEL argument."""
    try:
        import transformers
    except ImportError:
        raise ConfigError("this needs transformers: pip install 'transformers>=5.0'") from None
    transformers.logging.set_verbosity_error()
    types = transformers.CONFIG_MAPPING
    path = Path(name)
    if not name:
        raise ConfigError("MODEL is empty")
    if path.is_dir():
        path /= "config.json"
        if not path.is_file():
            raise ConfigError(f"the folder {name} has no config.json")
    if path.is_file():
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from None
        model_type = values.get("model_type") if isinstance(values, dict) else None
        if not isinstance(model_type, str):
            raise ConfigError(f"{path} names no model_type: it is no configuration of a model")
        if model_type not in types:
            raise ConfigError(f"{path}: transformers {transformers.__version__} has no model_type {model_type!r}")
        try:
            return types[model_type].from_dict(values)
        except Exception as error:  # transformers' own checks of its fields, of many types
            raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if name in types:
        return types[name]()
    if name.count("/") == 1 and not name.startswith((".", "/")):
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # a line for each of its retries
        try:
            return transformers.AutoConfig.from_pretrained(name)
        except Exception as error:
            raise ConfigError(f"no configuration of {name}: {(str(error).strip().splitlines() or [''])[0]}") from error
    near = difflib.get_close_matches(name, list(types), n=3)
    raise ConfigError(
        f"{name!r} is no folder, no file and no model type of transformers {transformers.__version__}"
        + (f"; did you mean {' or '.join(near)}?" if near else "")
    )


def _without_weights(config: Any) -> Any:
    """The causal LM of a configuration, else its base model, on the meta device, where any size builds at once."""
    import torch
    import transformers

    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    with torch.device("meta"):
        return auto.from_config(config)


if __name__ == "__main__":
    sys.exit(main())
