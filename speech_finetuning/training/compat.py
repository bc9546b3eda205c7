"""What the libraries make necessary: the names that they do not promise, and what is bent at them.

PRIVATE_NAMES lists every name that we rely on although no documentation promises it, wherever in
the project it is used. tests/training/test_compat.py asks the installed libraries for each, so that
a release that changes one fails a single test with that name in it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets.config
import torch
import transformers
from transformers import masking_utils
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


@dataclass(frozen=True, kw_only=True)
class PrivateName:
    """A name of a library that no documentation promises."""

    path: str  # "module:Class.name"
    used_in: str  # the module of ours that uses it; several: "cli.flags, cli.help"
    why: str
    seen_in: str = "transformers 5.24"
    ends: str = "never"  # what would let us do without
    parameters: tuple[str, ...] | None = None  # of a function, as it is called or overridden
    is_set_in: str | None = None  # of an instance's attribute: the method that assigns it


PRIVATE_NAMES = (
    # ---- checkpoints
    PrivateName(
        path="transformers.trainer:Trainer._save_checkpoint",
        parameters=("self", "model", "trial"),
        used_in="training.resumable",
        why="a checkpoint is written aside; and the Trainer has no public name for saving one",
        ends="a save that is atomic",
    ),
    PrivateName(
        path="transformers.trainer:Trainer._get_output_dir",
        parameters=("self", "trial"),
        used_in="training.compat",
        why="where the Trainer writes its checkpoint-N",
        ends="a save that is atomic",
    ),
    PrivateName(
        path="transformers.integrations.integration_utils:TensorBoardCallback._init_summary_writer",
        parameters=("self", "args"),
        used_in="training.callbacks",
        why="the curves begin with scores before training, when the library has no writer yet",
        ends="a writer that is made when it is needed",
    ),
    PrivateName(
        path="transformers.trainer:Trainer._save",
        parameters=("self", "output_dir", "state_dict"),
        used_in="training.resumable",
        why="the state that FSDP gathers has tied weights twice",
        ends="save_pretrained(state_dict=...) leaving out tied weights that are tensors apart",
    ),
    PrivateName(
        path="transformers.modeling_utils:PreTrainedModel.all_tied_weights_keys",
        is_set_in="post_init",
        used_in="training.resumable",
        why="the names of the tied weights",
        ends="as _save",
    ),
    PrivateName(
        path="transformers.trainer_utils:rotate_checkpoints",
        parameters=("output_dir", "save_total_limit", "best_model_checkpoint"),
        used_in="training.resumable",
        why="old checkpoints go only after the new one is complete",
        ends="on_save being called before the rotation",
    ),
    PrivateName(
        path="transformers.trainer_callback:TrainerState.best_global_step",
        used_in="training.compat",
        why="must be None while a checkpoint is saved, see without_best_step",
        ends="no barrier within _save_checkpoint",
    ),
    PrivateName(
        path="transformers.trainer:Trainer._determine_best_metric",
        parameters=("self", "metrics", "trial"),
        used_in="training.trainer",
        why="weights that lose too much on a guard set are not the best, whatever their metric",
        ends="a hook that may refuse a best model",
    ),
    # ---- the reading worker
    PrivateName(
        path="multiprocessing.queues:Queue._on_queue_feeder_error",
        parameters=("e", "obj"),
        used_in="training.reading_worker",
        why="a batch that cannot be handed over is dropped, and waited for without end",
        seen_in="Python 3.13",
        ends="a DataLoader that is told of it",
    ),
    PrivateName(
        path="multiprocessing.util:get_temp_dir",
        parameters=(),
        used_in="training.reading_worker",
        why="the folder of sockets: with a short path, made once and removed at the end",
        seen_in="Python 3.13",
        ends="the resource sharer keeping its paths short whatever TMPDIR is",
    ),
    # ---- continuing
    PrivateName(
        path="transformers.trainer:Trainer._load_from_checkpoint",
        parameters=("self", "resume_from_checkpoint"),
        used_in="training.stages",
        why="a finished run is loaded without a training; train() would add a step",
        ends="train() on a finished run changing nothing",
    ),
    PrivateName(
        path="transformers.trainer:Trainer._load_optimizer_and_scheduler",
        parameters=("self", "checkpoint"),
        used_in="training.resumable",
        why="--learning_rate and --max_steps of now must count, not the checkpoint's",
        ends="a scheduler that takes them",
    ),
    PrivateName(
        path="transformers.trainer:Trainer._init_training_state",
        parameters=("self", "max_steps"),
        used_in="training.resumable",
        why="--eval_steps, --save_steps and --logging_steps of now must count",
        ends="the state not remembering them",
    ),
    PrivateName(
        path="transformers.trainer:Trainer._load_rng_state",
        parameters=("self", "checkpoint"),
        used_in="training.trainer",
        why="the loader draws a seed after the random state is restored",
        ends="the state being restored after the loader is made",
    ),
    PrivateName(
        path="transformers.trainer:Trainer._load_scaler",
        parameters=("self", "checkpoint"),
        used_in="training.resumable",
        why="a checkpoint of an --fp16 run must go on without --fp16",
        ends="a scaler.pt being ignored where there is no scaler",
    ),
    PrivateName(
        path="accelerate:Accelerator.scaler",
        is_set_in="__init__",
        used_in="training.resumable",
        why="whether this run scales gradients",
        seen_in="accelerate 1.15",
        ends="as _load_scaler",
    ),
    PrivateName(
        path="transformers.trainer_callback:EarlyStoppingCallback.state",
        parameters=("self",),
        used_in="training.stages",
        why="the names under `attributes` in trainer_state.json are those that are set again",
        ends="restored callbacks keeping the arguments of now",
    ),
    # ---- the loop
    PrivateName(
        path="transformers.trainer:Trainer._tr_loss",
        is_set_in="_inner_training_loop",
        used_in="training.trainer",
        why="one NaN would stay in the running sum for ever (tr_loss -= tr_loss)",
        ends="the sum being set to zero",
    ),
    PrivateName(
        path="transformers.trainer:Trainer.floating_point_ops",
        parameters=("self", "inputs"),
        used_in="training.trainer",
        why="the estimate counts log-mel values as tokens",
    ),
    PrivateName(
        path="transformers.integrations.integration_utils:TensorBoardCallback.logging_dir",
        is_set_in="__init__",
        used_in="training.callbacks",
        why="set at the start of training only: scores before it would go to ./runs",
        ends="on_log finding the folder itself",
    ),
    PrivateName(
        path="transformers.masking_utils:find_packed_sequence_indices",
        parameters=("position_ids",),
        used_in="training.compat",
        why="asks the GPU in every forward pass whether rows are packed, see unpacked_rows",
        ends="a mask that does not depend on values on the GPU",
    ),
    PrivateName(
        path="torch._dynamo.config:allow_unspec_int_on_nn_module",
        used_in="training.compat",
        why="the encoder's window changes from batch to batch under --torch_compile",
        seen_in="torch 2.13",
        ends="sizes of modules being dynamic by default",
    ),
    # ---- scoring
    PrivateName(
        path="transformers.trainer_seq2seq:Seq2SeqTrainer._gen_kwargs",
        is_set_in="evaluate",
        used_in="training.trainer",
        why="--generation_max_length and --generation_num_beams as evaluate() read them",
        ends="evaluation_loop passing them to prediction_step",
    ),
    PrivateName(
        path="accelerate:Accelerator._models",
        is_set_in="__init__",
        used_in="training.compat",
        why="an untrained model must not be prepared for scoring, see scoring_untrained_model",
        seen_in="accelerate 1.15, transformers 5.24",
        ends="evaluation_loop leaving no trace in the accelerator",
    ),
    PrivateName(
        path="transformers.trainer:Trainer.deepspeed",
        is_set_in="__init__",
        used_in="training.compat",
        why="ZeRO-2 cannot be prepared for scoring, see scoring_untrained_model",
        ends="as _models",
    ),
    PrivateName(
        path="transformers.trainer:Trainer.is_deepspeed_enabled",
        is_set_in="create_accelerator_and_postprocess",
        used_in="training.stages",
        why="a finished run's model stays whole: there is no engine to split it",
        ends="as _models",
    ),
    # ---- Whisper
    PrivateName(
        path="transformers.models.whisper.modeling_whisper:WhisperEncoder.embed_positions",
        is_set_in="__init__",
        used_in="model.windows",
        why="its num_embeddings, and config.max_source_positions, are what forward() checks",
        ends="an encoder that reads shorter windows by itself",
    ),
    PrivateName(
        path="transformers.models.whisper.generation_whisper:"
        "WhisperGenerationMixin._maybe_reduce_batch",
        used_in="model.generation",
        why="it cuts input_features, which are None beside encoder_outputs",
        ends="generate(encoder_outputs=...) with several segments",
    ),
    PrivateName(
        path="transformers.models.whisper.tokenization_whisper:"
        "WhisperTokenizer.english_spelling_normalizer",
        is_set_in="__init__",
        used_in="training.resumable",
        why="save_pretrained does not write it (normalizer.json)",
        ends="save_pretrained writing it",
    ),
    PrivateName(
        path="transformers.models.whisper.tokenization_whisper:TO_LANGUAGE_CODE",
        used_in="model.languages",
        why="English names of languages to codes",
    ),
    # ---- data and flags
    *(
        PrivateName(
            path=f"datasets.config:{name}",
            used_in="training.compat",
            why="its waiting, up to 33 minutes for one read, would come on top of ours",
            seen_in="datasets 5.2",
        )
        for name in (
            "STREAMING_READ_MAX_RETRIES",
            "STREAMING_READ_RETRY_INTERVAL",
            "STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL",
            "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL",
            "STREAMING_OPEN_MAX_RETRIES",
        )
    ),
    PrivateName(
        path="datasets:IterableDataset._resolve_features",
        parameters=("self",),
        used_in="data.builders",
        why="columns of a stream whose features are not known without reading a row",
        seen_in="datasets 5.2",
        ends="a public name",
    ),
    PrivateName(
        path="datasets.packaged_modules.parquet.parquet:ParquetConfig.columns",
        used_in="data.builders",
        why="set after the builder is made: only then are the names of its columns known",
        seen_in="datasets 5.2",
        ends="files that may differ in columns which are not read",
    ),
    PrivateName(
        path="datasets.packaged_modules.folder_based_builder.folder_based_builder:"
        "FolderBasedBuilderConfig.decode_num_threads",
        used_in="data.builders",
        why="must be 0, else audio folders on the Hub are decoded despite casts",
        seen_in="datasets 5.2",
        ends="casts being followed",
    ),
    PrivateName(
        path="datasets.data_files:DataFilesList.origin_metadata",
        is_set_in="__init__",
        used_in="data.builders",
        why="a list of the same files under other names keeps its hash",
        seen_in="datasets 5.2",
        ends="folders whose names contain wildcards",
    ),
    PrivateName(
        path="huggingface_hub.utils._http:default_client_factory",
        parameters=(),
        used_in="base.network",
        why="its client, to which time-outs and the checks of responses are added",
        seen_in="huggingface_hub 2.4",
        ends="a public name, or time-outs for all requests",
    ),
    PrivateName(
        path="argparse:ArgumentParser._option_string_actions",
        is_set_in="argparse:_ActionsContainer.__init__",
        used_in="cli.flags, cli.help",
        why="all flags: for 'did you mean', and one by its name",
        seen_in="Python 3.11",
    ),
    PrivateName(
        path="argparse:ArgumentParser._actions",
        is_set_in="argparse:_ActionsContainer.__init__",
        used_in="cli.parsing, cli.help",
        why="all flags, in the order in which they are defined",
        seen_in="Python 3.11",
    ),
)


# -------------------------------------------------------------------------------- for the process


def leave_retrying_to_us() -> None:
    """Leaves retrying to base.network.Backoff: that of datasets (5.2, file_utils.py:832) would add
    up to 33 minutes for one read."""
    datasets.config.STREAMING_READ_MAX_RETRIES = 1
    datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    datasets.config.STREAMING_READ_RETRY_INTERVAL = 0
    datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
    datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0


def compile_windows_of_any_length() -> None:
    """Otherwise torch (2.13) takes `encoder_window`'s numbers for constants and compiles anew for
    every window of --train_window longest, from the ninth on no more."""
    torch._dynamo.config.allow_unspec_int_on_nn_module = True


# -------------------------------------------------------------------------- around a library call


@contextlib.contextmanager
def scoring_untrained_model(trainer: transformers.Trainer) -> Iterator[None]:
    """Lets evaluate() score a model that no training has prepared, and leaves no trace of it.

    evaluation_loop (transformers 5.24) prepares a model that accelerate does not know yet. It would
    stay without DDP, so that every rank would train a model of its own afterwards; FSDP cannot
    prepare a model without its optimizer (accelerate 1.15); and of DeepSpeed, ZeRO-3 would be
    prepared and ZeRO-2 fail unless an engine is there.
    """
    prepared_models = trainer.accelerator._models
    is_untrained = not prepared_models
    trainer.deepspeed = trainer.deepspeed or trainer.model
    if is_untrained:
        prepared_models.append(cast(torch.nn.Module, trainer.model).to(trainer.args.device))
    try:
        yield
    finally:
        if is_untrained:
            prepared_models.clear()


def no_packed_sequences(position_ids: torch.Tensor) -> None:
    """In place of find_packed_sequence_indices: what it finds in rows of one text each."""


@contextlib.contextmanager
def unpacked_rows(is_compiled: bool) -> Iterator[None]:
    """Spares a forward pass its question whether rows are packed sequences, which they never are.

    transformers (5.24, masking_utils.py:761) asks by `.all()` of a tensor on the GPU: the CPU then
    waits until all work in the queue is done, in every micro-batch, and cannot prepare the next.
    A compiled model does not ask.
    """
    if is_compiled:
        yield
        return
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = no_packed_sequences
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


@contextlib.contextmanager
def saving_in(trainer: transformers.Trainer, folder: Path) -> Iterator[None]:
    """Has the trainer write checkpoint-N into this folder instead of --output_dir; args.output_dir
    itself must not change, as it is saved with the checkpoint (transformers 5.24, trainer.py:3375).
    """
    trainer._get_output_dir = lambda trial: str(folder)
    try:
        yield
    finally:
        del trainer._get_output_dir


@contextlib.contextmanager
def without_best_step(state: transformers.TrainerState) -> Iterator[None]:
    """With best_global_step set, _save_checkpoint enters a barrier (transformers 5.24,
    trainer.py:3388), where ranks would wait for ever for one whose disk is full."""
    best_step = state.best_global_step
    state.best_global_step = None
    try:
        yield
    finally:
        state.best_global_step = best_step


def restore_early_stopping(
    trainer: transformers.Trainer, saved_callbacks: dict[str, Any]
) -> transformers.EarlyStoppingCallback | None:
    """Gives the early stopping of this run, if it has one, the count of the checkpoint.

    The library's own restore_callback_states_from_checkpoint (transformers 5.24, trainer.py:4047)
    would build it again with its *old* arguments, so that a changed --early_stopping_patience were
    ignored. Without either it would begin to count at 0.
    """
    callback = trainer.pop_callback(transformers.EarlyStoppingCallback)
    if callback is None:
        return None
    saved = saved_callbacks.get(type(callback).__name__, {"attributes": {}})
    for name, value in saved["attributes"].items():
        setattr(callback, name, value)
    trainer.add_callback(callback)
    return cast(transformers.EarlyStoppingCallback, callback)


def make_reproducible(training_args: transformers.Seq2SeqTrainingArguments) -> None:
    """Seeds what is drawn before training, alike on every rank: new adapters."""
    # Else the gradient of the decoder's positions differs in its last bit from run to run (torch
    # 2.13, index_put).
    on_cpu = training_args.device.type == "cpu"
    torch.use_deterministic_algorithms(training_args.full_determinism or on_cpu, warn_only=True)
    transformers.set_seed(training_args.seed)
    # Whole, in every process: transformers (5.23) cannot load a Whisper in ZeRO-3's parts.
    # DeepSpeed splits it later.
    unset_hf_deepspeed_config()
