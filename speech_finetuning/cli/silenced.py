"""What the libraries say that nobody can act upon, each by name and with the reason."""

import logging
import warnings
from dataclasses import dataclass

import datasets
import huggingface_hub.utils
import transformers

# They report every request and every file.
TALKATIVE_LIBRARIES = ("httpx", "httpx2", "datasets", "fsspec")
# They have handlers of their own, which would write into the bar.
LIBRARIES_WITH_HANDLERS = ("transformers", "datasets", "huggingface_hub", "torch", "evaluate")


# They tell what they have found in the data.
OPENING = ("speech_finetuning.data.columns", "speech_finetuning.data.hold_out")


@dataclass(frozen=True, kw_only=True)
class Silenced:
    """A message that is left out of the log."""

    text: str  # a part of it that stands in `source` in one piece
    rest: str = ""  # what follows in the case that is silenced
    source: str  # the library's file that says it
    reason: str
    seen_in: str


FAILED_TRY = " thrown while requesting "
SILENCED = (
    Silenced(
        text="Passing `generation_config` together with generation-related ",
        rest="arguments=({'",
        source="transformers/generation/utils.py",
        reason="Whisper's own generate() passes both to the general one",
        seen_in="transformers 5.24",
    ),
    Silenced(
        text="The attention mask is not set with a batched input, and cannot be inferred",
        source="transformers/generation/utils.py",
        reason="meant for decoders of text; Whisper's encoder has a window of fixed length, and no mask",
        seen_in="transformers 5.24",
    ),
    Silenced(
        text="Both `max_new_tokens` (=",
        source="transformers/generation/utils.py",
        reason="the checkpoint's generation config has the one and we pass the other, which is to win",
        seen_in="transformers 5.24",
    ),
    Silenced(
        text="There were missing keys in the checkpoint model loaded: ",
        rest="['proj_out.weight'].",
        source="transformers/trainer.py",
        reason="Whisper's output layer is its embedding, which is saved once",
        seen_in="transformers 5.24",
    ),
    Silenced(
        text="The following arguments do not match the ones in the `trainer_state.json`",
        source="transformers/trainer_utils.py",
        reason="our first screen says which flags have changed, and how often it scores and saves",
        seen_in="transformers 5.24",
    ),
    Silenced(
        text="Failed to read schema from '",
        source="datasets/packaged_modules/parquet/parquet.py",
        reason="the error that ends the run says the same, once",
        seen_in="datasets 5.2",
    ),
    Silenced(
        text="Failed to read file '",
        source="datasets/packaged_modules/parquet/parquet.py",
        reason="a rejected row says the same, once; of a row group without rows it is no failure",
        seen_in="datasets 5.2",
    ),
    Silenced(
        text=FAILED_TRY,
        source="huggingface_hub/utils/_http.py",
        reason="of each of six tries; one is told in our words, the last by base.network",
        seen_in="huggingface_hub 2.4",
    ),
    Silenced(
        text="Retrying in ",
        source="huggingface_hub/utils/_http.py",
        reason="as above",
        seen_in="huggingface_hub 2.4",
    ),
)


class WithoutSilenced(logging.Filter):
    """Lets everything pass but what is in SILENCED; of the libraries only one process speaks. What
    is said of data when they are opened is said once, though they may be opened to train and to
    score."""

    def __init__(self, is_main: bool) -> None:
        super().__init__()
        self.is_main = is_main
        self.said: set[str] = set()
        self.texts = [f"{entry.text}{entry.rest}" for entry in SILENCED]

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("speech_finetuning"):
            return not self.was_said(record)
        if not self.is_main and record.levelno < logging.ERROR:
            return False
        message = record.getMessage()
        if FAILED_TRY in message and FAILED_TRY not in self.said:
            # Said once, as the tries and the pauses between them take 23 s or more.
            self.said.add(FAILED_TRY)
            record.msg = (
                f"no answer from the network ({message.partition(FAILED_TRY)[0]}): asking again."
            )
            record.args = ()
            return True
        return not any(text in message for text in self.texts)

    def was_said(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(OPENING) or record.levelno > logging.INFO:
            return False
        message = record.getMessage()
        if message in self.said:
            return True
        self.said.add(message)
        return False


def quieten_libraries() -> None:
    """Sends what the libraries log and warn of to the root logger, and switches their bars off; the
    Hub's of a download stay."""
    for name in LIBRARIES_WITH_HANDLERS:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    for name in TALKATIVE_LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.logging.set_verbosity_warning()
    logging.captureWarnings(True)
    datasets.disable_progress_bars()  # of rows written; the log says how many there are
    transformers.logging.disable_progress_bar()  # of weights loaded and written, which takes seconds
    with warnings.catch_warnings():
        # Also where HF_HUB_DISABLE_PROGRESS_BARS has the last word.
        warnings.simplefilter("ignore")
        huggingface_hub.utils.enable_progress_bars()
