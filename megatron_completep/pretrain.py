"""Train one model from one YAML file.

Examples:

    python -m megatron_completep.pretrain configs/quickstart.yaml training.train_steps=200
    torchrun --nproc-per-node 8 -m megatron_completep.pretrain configs/completep_1b.yaml
"""

from __future__ import annotations

from megatron_completep.launch import Launch, begin_program, leave_with_launcher

if __name__ == "__main__":
    begin_program()  # before the imports below, which take seconds

from collections.abc import Callable, Sequence
from pathlib import Path

from torch.distributed.distributed_c10d import Store

from megatron_completep.checkpoint import Checkpointer, FailPoint, no_fail_point
from megatron_completep.command_line import Parser, file_to_read
from megatron_completep.completep import Table, table_of
from megatron_completep.config import Config, check_world, load_config
from megatron_completep.data.loader import Loader
from megatron_completep.errors import exit_on_user_error
from megatron_completep.guards import Guard, Watchdog
from megatron_completep.optim.check import check_parameters
from megatron_completep.parallel.context import ParallelContext, choose_device
from megatron_completep.parallel.rendezvous import ignore, meet
from megatron_completep.run.assemble import Assembly, assemble
from megatron_completep.run.console import say_on_stderr, say_on_stdout
from megatron_completep.run.determinism import use_deterministic_algorithms
from megatron_completep.run.precision import use_threads
from megatron_completep.run.signals import StopSignals
from megatron_completep.run.state import ExitCode, RunState
from megatron_completep.telemetry.node import node_lines
from megatron_completep.telemetry.startup import StartupClock, StartupReport
from megatron_completep.training import build
from megatron_completep.training.loop import train


def pretrain(
    config: Config, fail_point: FailPoint = no_fail_point, clock: StartupClock | None = None
) -> ExitCode:
    """Train one model, watched from the beginning: it obeys signals, and a hang comes to an end.

    fail_point: called at named places of a save; the tests of faults pass one that breaks something
    there. clock: has run since the process began. Raises UserError for what the user can mend.
    """
    clock = clock or StartupClock()
    launch = Launch.from_environment()
    leave_with_launcher()

    # A mistake is refused before this rank meets the others, or they would wait for it in vain.
    check_world(config, launch.world_size)
    table = table_of(config)
    warnings = check_parameters(config, table)
    training = config.training
    choose_device(training.device, launch.local_rank)

    say = say_on_stdout if launch.rank == 0 else ignore
    folder = Path(training.output_dir)
    hang_minutes = config.guards.hang_timeout_minutes
    hang_seconds = 60 * hang_minutes if hang_minutes else None
    exit_after_minutes = training.exit_after_minutes
    with StopSignals(say, exit_after_minutes, clock.elapsed, launch.by_torchrun) as signals:
        store = meet(launch, 60 * config.parallel.timeout_minutes, say)
        with Watchdog(launch, folder, hang_seconds, store, say_on_stderr) as watchdog:
            return train_one_model(
                config, launch, store, signals, watchdog, say, fail_point, clock, table, warnings
            )


def train_one_model(
    config: Config,
    launch: Launch,
    store: Store | None,
    signals: StopSignals,
    watchdog: Watchdog,
    say: Callable[[str], None],
    fail_point: FailPoint,
    clock: StartupClock,
    table: Table,
    warnings: Sequence[str],
) -> ExitCode:
    """Read this function first: it visits every room once, in order."""
    if config.training.deterministic:
        use_deterministic_algorithms()  # before anything touches a device
    watchdog.enter_phase("joining the process group")
    # NCCL's own watchdog writes its newest collectives there when one of them times out.
    timeout_files = f"{config.training.output_dir}/nccl_timeout_rank_"
    device_name = config.training.device
    context = ParallelContext.create(config.parallel, device_name, timeout_files, store)

    # From here on a user's mistake that one rank meets is raised on all of them.
    guard = Guard(config, context, launch, watchdog, say)
    guard.on_first(lambda: build.prepare_output(config))
    for warning in warnings:
        say(f"warning: {warning}")
    for line in node_lines(guard.exchange, launch, context.device, config):
        say(line)
    threads = use_threads(config.training.cpu_threads, launch.local_world_size)
    clock.done("process_groups")

    watchdog.enter_phase("building the model")
    assembly = assemble(config, context, table)
    step = assembly.step
    precision = assembly.precision
    clock.done("model")

    watchdog.enter_phase("opening the data")
    loader = build.build_training_loader(config, context)
    validation = build.build_validation(config, context)
    guard.on_first(lambda: build.keep_run_tokenizer(config, say))
    clock.done("data")

    # A slow disk is no hang: loading gets nearly the time that a rank waits for another one there.
    load_seconds = 0.9 * 60 * config.checkpoint.timeout_minutes
    watchdog.enter_phase("loading the checkpoint", at_least_seconds=load_seconds)
    checkpointer = _checkpointer_of(
        config, context, assembly, table, loader, guard, say, fail_point
    )
    state = checkpointer.load_latest() or RunState()
    guard.note_start(state.step)
    guard.on_first(lambda: build.record_start(config, state))
    clock.done("checkpoint")

    watchdog.enter_phase("preparing the first step")
    rollbacks = guard.rollbacks(checkpointer)
    chunks = assembly.chunks
    say(build.describe_run(config, context, precision, threads, chunks, assembly.products))
    if state.step:
        say(f"resumed after step {state.step}")
    # A finished run goes through the loop all the same, which takes no step and closes every hook.
    if (done := build.nothing_left(config, state)) is not None:
        say(done)
    hooks = [*guard.hooks(step, state, rollbacks), StartupReport(clock, say)]
    hooks += build.default_hooks(
        config, context, step, validation, checkpointer, state, precision, say
    )
    code = train(config, context, step, loader, state, hooks, signals, rollbacks)
    guard.close()
    context.close()
    return code


def _checkpointer_of(
    config: Config,
    context: ParallelContext,
    assembly: Assembly,
    table: Table,
    loader: Loader,
    guard: Guard,
    say: Callable[[str], None],
    fail_point: FailPoint,
) -> Checkpointer:
    """What saves and loads the run: weights, optimizer, and which samples have been consumed."""
    fingerprints = {"data": loader.fingerprint()}
    return Checkpointer(
        config,
        context,
        assembly.optimizer,
        table,
        fingerprints,
        say,
        fail_point,
        order=loader.corpus,
        still_here=guard.still_here,
        products=assembly.products,
    )


def main(argv: Sequence[str] | None = None) -> int | None:
    """Read the command line, train, and return the exit code of the process."""
    clock = StartupClock.from_process_start()
    parser = Parser(__doc__)
    parser.add_argument(
        "config", type=file_to_read, metavar="CONFIG", help="the YAML file of the run"
    )
    parser.add_overrides()
    arguments = parser.parse_args(argv)
    return pretrain(load_config(arguments.config, arguments.overrides), clock=clock)


if __name__ == "__main__":
    exit_on_user_error(main)
