"""The commands that train and measure: ``lightning fit|validate|test|predict --config ...``."""

import logging
import signal
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Protocol

import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lte_lightning.bars import lines_above_bars
from lte_lightning.callbacks import (
    BestCheckpoint,
    EpochLines,
    LastCheckpoint,
    StageProgressBar,
    StageSchedule,
)
from lte_lightning.choices import options_by_name
from lte_lightning.cli import refuse
from lte_lightning.cli.checkpoint_errors import guard_checkpoints, reading
from lte_lightning.cli.guard import MODE, check_passwords, guard_configurations
from lte_lightning.cli.ineffective_options import GivenOptions, check_ineffective
from lte_lightning.cli.option_errors import LteParser, config_files
from lte_lightning.cli.signals import on_sigterm
from lte_lightning.errors import UserError, meant_path
from lte_lightning.files import SHARDED, is_checkpoint, write_text
from lte_lightning.quiet import without_bars
from lte_lightning.recording.loggers import send_files
from lte_lightning.recording.recorder import Recorder
from lte_lightning.recording.tracking import Rates, announce, run_name
from lte_lightning.selection import import_selector
from lte_lightning.store import STORE, named_by_file, users_store
from lte_lightning.tasks.base import LteModule
from lte_lightning.trainer import declared

EXTRAS = ("tensorboard", "wandb")  # with the packages of loggers


class SaveConfig(SaveConfigCallback):
    """Keeps the resolved configuration in the run folder and on the MLflow run."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes ``config.yaml``; a resumed fit leaves the one it began with."""
        text = self.parser.dump(self.config, skip_none=False, skip_validation=True)  # parsing has validated it
        recorder = next(callback for callback in declared(trainer).callbacks if isinstance(callback, Recorder))
        if recorder.folder is None:
            return
        name = "config.yaml" if stage == "fit" else f"config-{TrainerFn(stage).value}.yaml"
        if stage != "fit" or not (recorder.folder / name).exists():
            write_text(recorder.folder / name, text)
        config = yaml.safe_load(text)
        # how a fit went on is no choice: one that was resumed equals one that was not interrupted
        recorder.options = options_by_name(config | {"ckpt_path": None})
        announce(trainer, pl_module, config)
        send_files(trainer, recorder.folder / name)


class LteCLI(LightningCLI):
    """LightningCLI that always has the stage schedule and the recorder.

    Attributes:
        wanted: The command that is run; no other's parser is made. All are if it is None.
    """

    wanted: ClassVar[str | None] = None

    def __init__(self, *args: Any, **options: Any) -> None:
        """Parses and runs the command."""
        with ExitStack() as self._while_it_runs:
            self._while_it_runs.enter_context(lines_above_bars())
            super().__init__(*args, **options)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Returns the commands, each with the arguments of the trainer's method that are no options."""
        every, wanted = LightningCLI.subcommands(), LteCLI.wanted
        return {wanted: every[wanted]} if wanted in every else every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds ``stages`` and ``run``, and links the options that must agree."""
        parser.add_lightning_class_args(StageSchedule, "stages")
        parser.add_lightning_class_args(Recorder, "run")
        sources = ("model.init_args.init_from", "model.init_args.pretrained")
        parser.link_arguments(sources, "data.init_args.tokenizer", compute_fn=_tokenizer)
        parser.link_arguments("data", "model.init_args.task", compute_fn=_task, apply_on="instantiate")
        for target in ("stages.seed", "data.init_args.seed", "model.init_args.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=_seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, imports a selector named by its class path, and refuses a checkpoint that is missing or damaged."""
        super().parse_arguments(parser, args)
        self._words = [*(sys.argv[1:] if args is None else args)]
        self._given = LteParser.before_links
        assert isinstance(parser, LteParser)  # make_cli says so
        self._in_files = parser.in_files(self._words)
        config = self.config[self.config.subcommand] if "subcommand" in self.config else self.config
        check_passwords(config.as_dict())
        if isinstance(name := config.get("model.init_args.lte.selector"), str):
            import_selector(name)
        path = config.get("ckpt_path")
        if path and not is_checkpoint(Path(path)):
            state = "a folder" if Path(path).is_dir() else "damaged" if Path(path).exists() else "missing"
            near = "" if Path(path).exists() else meant_path(path)
            raise UserError(
                f"{path} is {state}{near}; --ckpt_path needs a checkpoint, such as RUN/checkpoints/last.ckpt"
            )

    def _parse_ckpt_path(self) -> None:
        """Lets Lightning read the options of a checkpoint, which may be a file or a folder."""
        options: Any = self.config[self.config.subcommand] if self.config.get("subcommand") else {}
        path = options.get("ckpt_path")
        if not path:
            return
        if Path(path).is_dir():
            options.ckpt_path = str(Path(path, SHARDED[0]))
        with reading(path):
            super()._parse_ckpt_path()
        self.config[self.config.subcommand].ckpt_path = path

    def _dump_config(self) -> None:
        """Keeps the options for the modules' checkpoints, as Lightning does, without validating all of them again."""
        if not hasattr(self, "config_dump"):
            text = self.parser.dump(self.config, skip_link_targets=False, skip_none=False, skip_validation=True)
            options = yaml.safe_load(text)
            self.config_dump = options[self.config.subcommand] if "subcommand" in self.config else options

    def before_instantiate_classes(self) -> None:
        """Names the options without effect, and refuses those that a checkpoint or a link would replace."""
        config = self.config[self.config.subcommand] if "subcommand" in self.config else self.config
        given = GivenOptions(self._given, self._in_files, self._words)
        check_ineffective(given, config, self.config.get("subcommand"))
        if (uri := config.get(STORE)) and not given.typed(STORE) and _records(config.run.mlflow, config.trainer.logger):
            named_by_file(uri, users_store(), Path(config_files(self._words)[-1]))
        if config.get("trainer.enable_progress_bar") is False:
            self._while_it_runs.enter_context(without_bars())

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Finds the run's place, and makes its MLflow logger unless the configuration says otherwise."""
        config = self.config_init[self.subcommand] if self.subcommand else self.config_init
        # a fit goes on with a run only by its checkpoint: from weights alone it begins a new one
        init_from = None if self.subcommand == "fit" else config.model.hparams["init_from"]
        if origin := config.get("ckpt_path") or init_from:
            config.run.resume(origin)
        chosen = config.trainer.logger
        loggers = [] if chosen in (None, True, False) else chosen if isinstance(chosen, list) else [chosen]
        if config.run.mlflow and chosen is False:
            raise UserError("trainer.logger false and run.mlflow true contradict each other; remove one of them")
        if _records(config.run.mlflow, chosen):
            kwargs["logger"] = [config.run.make_logger(run_name(config.model, config.data)), *loggers]
        elif chosen in (None, True):
            kwargs["logger"] = False  # or Lightning makes its own
        callbacks = config.trainer.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        ours: list[Callback] = [EpochLines(), Rates()]
        if config.trainer.enable_progress_bar is not False and not any(
            isinstance(callback, ProgressBar) for callback in callbacks
        ):
            ours.append(StageProgressBar())  # before the recorder, so that the bar stops before the recorder prints
        kwargs["callbacks"] = [*ours, *callbacks]
        try:
            trainer: Trainer = super().instantiate_trainer(**kwargs)
            guard_checkpoints(trainer)
            return trainer
        except Exception as error:  # for example a missing device
            config.run.forget(kwargs["logger"][0] if kwargs.get("logger") else None)
            if isinstance(error, ValueError) and not isinstance(error, UserError):  # of Lightning's options
                raise UserError(str(error)) from error
            raise

    def before_fit(self) -> None:
        """Lets SIGTERM end a fit in its set-up, before Lightning listens, too; its run would seem to go on for ever."""

        def end(*_: Any) -> None:
            if not self.trainer.received_sigterm:  # then Lightning listens, and ends the fit after the batch
                raise SIGTERMException

        self._while_it_runs.enter_context(on_sigterm(end))

    def before_test(self) -> None:
        """Turns off Lightning's table: it would have a column for each loader and a row for every layer."""
        self.config_init["test"]["verbose"] = False

    def after_run(self) -> None:
        """Shows the results, after every progress bar is gone."""
        self.config_init[self.subcommand].run.report()

    after_fit = after_test = after_predict = after_run


def _records(mlflow: bool | None, logger: Any) -> bool:
    """Says whether a fit records in MLflow: by ``run.mlflow``, or unless ``trainer.logger`` names another logger."""
    return logger in (None, True) if mlflow is None else mlflow


class _HasTask(Protocol):
    task: str


def _tokenizer(init_from: str | None, pretrained: str) -> str:
    # weights from elsewhere come with their own tokenizer, unless the folder has none
    if not init_from:
        return pretrained
    is_local = init_from.startswith((".", "/")) or Path(init_from).is_dir()
    if is_local and not any(Path(init_from).glob("tokenizer*")):
        return pretrained
    return init_from


def _task(data: _HasTask) -> str:
    return data.task


def _seed(value: bool | int) -> int:
    return int(value)


def main(args: list[str] | None = None) -> None:
    """Runs a command; an error that the user can put right is one message and exit code 1."""
    try:
        make_cli(args)
    except Exception as error:
        if (cause := user_error(error)) is None:
            raise
        refuse(cause)
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)  # Lightning's own exit code would be 0


def user_error(error: BaseException) -> BaseException | None:
    """Returns the user's error among an exception and its causes; None if there is none."""
    # jsonargparse wraps what a class says when it is made; Lightning has its own error for what users can put right
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError | MisconfigurationException):
        if isinstance(cause, ModuleNotFoundError):  # the package of a logger or callback
            line = str(cause).partition("\n")[0].removesuffix(".")
            extra = next((name for name in EXTRAS if name in line), None)
            return UserError(line + (f' (pip install "lte-lightning[{extra}]")' if extra else ""))
        cause = cause.__cause__ or cause.__context__
    return cause


def make_cli(args: list[Any] | None = None, run: bool = True, cli_class: type[LteCLI] = LteCLI) -> LteCLI:
    """Parses a command line and, if asked, runs its subcommand; with ``run=False`` it only parses."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    guard_configurations()
    # Lightning warns of these at every fit, and no user can mend them: it asks torch 2.13 for the type of a LeafSpec,
    # and its summary of the model counts megabytes in 32 bits. Short epochs are logged by `Rates`, after the warning
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "Precision .* is not supported by the model summary")
    warnings.filterwarnings("ignore", r"The number of training batches \(.*\) is smaller than the logging interval")
    # advertisements do not belong in the log of an experiment
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "💡 Tip" not in str(record.msg))
    words = sys.argv[1:] if args is None else args
    LteCLI.wanted = words[0] if run and words and isinstance(words[0], str) else None
    return cli_class(
        LteModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        trainer_defaults={
            "max_epochs": -1,
            "use_distributed_sampler": False,
            "enable_model_summary": False,  # the recorder prints a line instead
            "callbacks": [LastCheckpoint(), BestCheckpoint()],
        },
        parser_class=LteParser,
        parser_kwargs={"parser_mode": MODE, "allow_abbrev": False},  # a typo is not taken for an option
        args=args,
        run=run,
    )
