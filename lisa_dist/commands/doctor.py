"""``lisa-dist doctor``: what training needs, tried here, and what to do about what does not work."""

from __future__ import annotations

import dataclasses
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from rich.console import Console

from lisa_dist.commands import self_test
from lisa_dist.config import EXIT_DONE, EXIT_FAILED, Config, UserError
from lisa_dist.config.paths import local_path
from lisa_dist.runtime import distributed
from lisa_dist.runtime.environment import has_ranks
from lisa_dist.runtime.units import GIB, format_bytes
from lisa_dist.training.limits import open_tokenizer

PACKAGE = "lisa-dist"
LITTLE_DISK, NO_DISK = 20 * GIB, 1 * GIB  # below the first a warning, below the second broken
SELF_TEST, SELF_TEST_SECONDS = "self-test in ranks", 240
ERROR_LINE = r"(\[rank\d+\]: ?)?[\w.]*Error: "  # the last line of a traceback, as torchrun passes it on

OK, WARNING, BROKEN = "ok", "warning", "broken"
STYLES = {OK: "green", WARNING: "yellow", BROKEN: "bold red"}


@dataclass(frozen=True)
class Finding:
    """What one check found: how things are, and what to do where they are not well."""

    name: str
    state: str  # ok, warning or broken
    detail: str
    fix: str = ""


def run(config: Config) -> int:
    """Check everything, print the findings, and return 0, or 1 where something is broken.

    In ranks of a launcher (torchrun, srun) the self-test runs over these ranks, else over ranks of this machine: the
    visible GPUs, or two on the CPU. Collective in ranks: every rank.
    """
    checks: tuple[Callable[[Config], Iterator[Finding]], ...]
    checks = (check_packages, check_gpus, check_network, check_disk, check_tokenizer, check_ranks)
    console = Console(highlight=False, markup=False)
    broken = 0
    for check in checks:
        for finding in check(config):
            broken += finding.state == BROKEN
            if distributed.is_main() or finding.state == BROKEN:
                console.print(f"{finding.state:>7}", style=STYLES[finding.state], end="")
                console.print(f"  {finding.name}: {finding.detail}", soft_wrap=True)
                if finding.fix:
                    console.print(f"         {finding.fix}", soft_wrap=True)
    return EXIT_FAILED if broken else EXIT_DONE


def check_packages(config: Config) -> Iterator[Finding]:
    """Compare what is installed with what the package requires."""
    wrong = []
    for text in metadata.requires(PACKAGE) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if wrong:
        yield Finding("packages", BROKEN, "; ".join(wrong), f"pip install --upgrade {PACKAGE}")
    else:
        versions = [f"{name} {metadata.version(name)}" for name in (PACKAGE, "torch", "transformers")]
        yield Finding("packages", OK, ", ".join(versions))


def check_gpus(config: Config) -> Iterator[Finding]:
    """Look at the GPUs that torch sees, and whether it overlooks some."""
    driver = _driver_gpus()
    if not torch.cuda.is_available():
        if driver:
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            fix = "install a torch whose CUDA the driver supports (https://pytorch.org/get-started)"
            yield Finding("GPUs", BROKEN, f"the driver has {driver} but torch, {built}, can use none", fix)
        else:
            yield Finding("GPUs", OK, "none, training runs on the CPU through gloo")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        detail = f"{properties.name}, {format_bytes(free)} of {format_bytes(total)} free"
        if not torch.cuda.is_bf16_supported():
            fix = "set precision.compute=float32 and precision.frozen=float32"
            yield Finding(f"GPU {index}", WARNING, f"{detail}, without bfloat16", fix)
        elif free < 0.9 * total:
            yield Finding(f"GPU {index}", WARNING, detail, "another process holds memory: see nvidia-smi")
        else:
            yield Finding(f"GPU {index}", OK, detail)
    if dist.is_nccl_available():
        yield Finding("NCCL", OK, ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding("NCCL", BROKEN, "torch has none", "install torch from https://pytorch.org/get-started")


def _driver_gpus() -> str:
    """Return the GPUs that nvidia-smi lists, empty where there is no driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    listed = subprocess.run([command, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return ", ".join(listed.stdout.split("\n")).strip(", ") if listed.returncode == 0 else ""


def check_network(config: Config) -> Iterator[Finding]:
    """Open ports as a rendezvous does, and look up this machine's name."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
        yield Finding("ports", OK, "a port can be opened and reached on loopback")
    except OSError as error:
        fix = "ask whoever runs this machine: ranks talk through such ports"
        yield Finding("ports", BROKEN, f"no port can be opened or reached on loopback ({error})", fix)
    name = socket.gethostname()
    try:
        yield Finding("host name", OK, f"{name} is {socket.gethostbyname(name)}")
    except OSError:
        fix = "needed for more than one machine only: give it an address in DNS or /etc/hosts"
        yield Finding("host name", WARNING, f"{name} has no address", fix)


def check_disk(config: Config) -> Iterator[Finding]:
    """Look at the room for runs and for temporary files, and whether runs can be written."""
    directory = local_path(config.run.dir or "runs").absolute()
    existing = next(parent for parent in (directory, *directory.parents) if parent.is_dir())
    for name, place in (("disk for runs", existing), ("disk for temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(place).free
        state = BROKEN if free < NO_DISK else WARNING if free < LITTLE_DISK else OK
        fix = "" if state == OK else "make room, or choose another place (run.dir=DIR, TMPDIR)"
        try:
            with tempfile.NamedTemporaryFile(dir=place):
                yield Finding(name, state, f"{format_bytes(free)} free at {place}", fix)
        except OSError as error:
            fix = "choose another run.dir or TMPDIR"
            yield Finding(name, BROKEN, f"{place} can't be written ({error.strerror})", fix)


def check_tokenizer(config: Config) -> Iterator[Finding]:
    """Load the tokenizer of the configured model."""
    name = config.model.tokenizer or config.model.path
    try:
        tokenizer = open_tokenizer(config.model)
    except UserError as error:
        yield Finding("tokenizer", BROKEN, str(error), "name another model.path, or model.tokenizer")
        return
    template = "with a chat template" if tokenizer.chat_template else "without a chat template: a plain one is used"
    yield Finding("tokenizer", OK, f"{name}: {len(tokenizer)} tokens, {template}")


def check_ranks(config: Config) -> Iterator[Finding]:
    """Run the self-test in the ranks of the launcher, or by torchrun here. Collective in ranks: every rank."""
    yield _test_these_ranks(config) if has_ranks() else _test_by_torchrun(torch.cuda.device_count() or 2)


def _test_these_ranks(config: Config) -> Finding:
    distributed.initialize(config.parallel)
    parent = local_path(config.run.dir) if config.run.dir else Path.cwd()
    directory = Path(distributed.on_rank_zero(lambda: _make_directory(parent)))
    try:
        self_test.run(dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(directory))))
    except Exception as error:
        return Finding(SELF_TEST, BROKEN, f"rank {distributed.rank()}: {error}", "fix what the first rank names")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return Finding(SELF_TEST, OK, _what_worked(distributed.world_size()))


def _test_by_torchrun(ranks: int) -> Finding:
    with tempfile.TemporaryDirectory(prefix="lisa-dist-doctor-") as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", self_test.__name__, folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SELF_TEST_SECONDS)
        except subprocess.TimeoutExpired:
            fix = "the ranks do not reach one another: look at NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and firewalls"
            return Finding(SELF_TEST, BROKEN, f"{ranks} ranks did not end within {SELF_TEST_SECONDS} s", fix)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if re.match(ERROR_LINE, line)]
        first = errors[0] if errors else f"ended with code {done.returncode}"
        return Finding(SELF_TEST, BROKEN, f"{ranks} ranks: {first}", f"to see more: {' '.join(command[:-1])} DIR")
    return Finding(SELF_TEST, OK, _what_worked(ranks))


def _make_directory(parent: Path) -> str:
    parent.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix="doctor-", dir=parent)


def _what_worked(ranks: int) -> str:
    backend = "NCCL" if torch.cuda.is_available() else "gloo"
    return f"all-reduce over {ranks} ranks by {backend}, steps of a tiny model, a checkpoint written and read back"
