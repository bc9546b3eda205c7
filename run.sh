#!/usr/bin/env bash
# Recipes for run_speech_recognition_seq2seq_streaming.py. Each is a list of
# flags; append any flag to change it:
#   bash run.sh                    Whisper small on Spanish, on the GPUs of this
#                                  machine, pushed to the Hub;
#                                  in ./whisper-small-es
#   bash run.sh --max_steps 500    the same with another flag
#   bash run.sh smoke              the whole job on any machine: tiny model, 8
#                                  utterances, no account; in a folder below /tmp
#   bash run.sh learn              a minute on two cores in which a tiny model
#                                  really learns; in ./whisper-learn, and goes on
#                                  there if it was interrupted
#   bash run.sh check DATA         reads all of a data set, without a model, and
#                                  writes what is odd about it into ./check-DATA
#                                  (of ".": beside it): check.html, lists of rows
#   bash run.sh demo MODEL         a page in the browser to speak to a model: a
#                                  folder or a Hub id
#   bash run.sh transcribe MODEL FILE...
#                                  text or subtitles of audio files, or of
#                                  folders of them
#   bash run.sh export MODEL --to ctranslate2
#                                  the model for faster-whisper, or (--to ggml)
#                                  for whisper.cpp
#   bash run.sh test               the tests
#   bash run.sh help               this
# The script's own flags: bash run.sh --help.
# One process is started for each visible GPU; NUM_PROCESSES=1 bash run.sh
# overrides that. RESTART=1 bash run.sh starts again when the machine or the
# network took the run away (never after Ctrl-C). PYTHON=python3.12 chooses the
# Python that .venv is made with; VENV=FOLDER puts it elsewhere.
set -euo pipefail
calling_dir=$PWD
project_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
script="$project_dir/run_speech_recognition_seq2seq_streaming.py"
venv=${VENV:-"$project_dir/.venv"}
python="$venv/bin/python"

# What goes on; stdout is for results: transcripts, the answer of help.
say() { echo "$*" >&2; }

# Makes .venv on first use, and again when the requirements have changed.
set_up() {
  local requirements=("$@") stamp found=${PYTHON:-python3} stamp_file="$venv/.requirements-$#${2:+-$2}"
  stamp=$(cd "$project_dir" && cat "${requirements[@]}" | cksum)
  if [[ -x $python && $(cat "$stamp_file" 2>/dev/null) == "$stamp" ]]; then return; fi
  if ! command -v "$found" >/dev/null; then
    say "error: $found was not found. Install Python 3.11, 3.12 or 3.13, or set PYTHON=/path/to/it."; exit 2
  fi
  if [[ ! -x $python ]] && ! "$found" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    say "error: Python 3.11 or newer is needed, $found is $("$found" -V 2>&1). Set PYTHON=python3.12 (or where yours is)."
    exit 2
  fi
  if [[ -x $python ]]; then
    say "installing what is missing in $venv (${requirements[*]}) ..."
  else
    say "setting up $venv (once; torch is large, so this takes some minutes) ..."
  fi
  [[ -x $python ]] || "$found" -m venv "$venv" >&2
  local arguments=()
  for file in "${requirements[@]}"; do arguments+=(-r "$project_dir/$file"); done
  # torch first and alone: a package that asks for any torch would otherwise bring another one.
  "$python" -m pip install --quiet --disable-pip-version-check "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' "$project_dir/requirements.txt")" >&2
  "$python" -m pip install --quiet --disable-pip-version-check "${arguments[@]}" >&2
  echo "$stamp" >"$stamp_file"
}

# The GPUs that the trainer will see, without the second or two that asking torch costs.
count_gpus() {
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[0-9A-Z]' || true
  else
    { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true
  fi
}

# One process replaces this shell, so that signals reach it. Several are started by torchrun, which
# gives them SHUTDOWN_TIMEOUT seconds to save (its own default is 30) and hides their exit codes: the
# first of them to end leaves its own in the file that EXIT_STATUS_FILE names. With RESTART=1 this
# shell stays and starts again after exit code 75 (try again) and after death by any signal but SIGINT.
train() {
  local child code status ended="" processes=${NUM_PROCESSES:-$(count_gpus)} command=("$python" "$script")
  if ((processes > 1)); then
    say "run.sh: $processes processes, by torchrun (NUM_PROCESSES=1 for one)"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun's own choice, which it would warn of
    command=("$python" -m torch.distributed.run --standalone --nproc_per_node "$processes"
      --shutdown-timeout "${SHUTDOWN_TIMEOUT:-300}" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "$script")
  else
    if (($(count_gpus) > 1)); then # the trainer refuses several GPUs in one process
      local visible=${CUDA_VISIBLE_DEVICES:-0}
      export CUDA_VISIBLE_DEVICES=${visible%%,*}
    fi
    if [[ -z ${RESTART:-} ]]; then exec "${command[@]}" "$@"; fi
  fi
  status="$(mktemp -d)/exit_status.json"
  export EXIT_STATUS_FILE=$status
  trap 'ended=1; kill -s TERM "$child"' TERM HUP USR1
  trap 'ended=1' INT # the terminal sends it to the trainer as well
  while true; do
    rm -f "$status"
    "${command[@]}" "$@" &
    child=$! code=0
    while wait "$child" || code=$?; kill -0 "$child" 2>/dev/null; do code=0; done
    if ((processes > 1)) && [[ -s $status ]]; then
      code=$(sed -n 's/^  "code": \([0-9]*\),$/\1/p' "$status")
    fi
    if [[ -z ${RESTART:-} || $ended || ($code != 75 && $code -le 128) || $code == 130 ]]; then
      rm -rf "$(dirname "$status")"
      exit "$code"
    fi
    say "run.sh: the trainer ended with code $code; starting it again in ${RESTART_DELAY:-10} s"
    sleep "${RESTART_DELAY:-10}"
  done
}

# Answers a question and refuses mistakes among the flags of `train`, before their data are made.
check_flags() {
  case " $* " in *" --help "* | *" --help_all "* | *" --version "*) exec "$python" "$script" "$@" ;; esac
  PYTHONPATH="$project_dir" "$python" -P -m speech_finetuning.cli.early_exit "$script" "$@"
}

# The demonstration model and data, made on the spot: TRAIN VALIDATION rows in FOLDER.
make_demonstration() {
  say "making a tiny model and synthetic speech ..."
  PYTHONPATH="$project_dir" "$python" -m speech_finetuning.cli.demonstration "$1" --train "$2" --validation "$3" --test "$3"
}

smoke() {
  set_up requirements.txt
  local folder
  folder=$(mktemp -u "${TMPDIR:-/tmp}/whisper-smoke.XXXXXX")
  local flags=(
    --model_name_or_path "$folder/model"
    --dataset_name "$folder/speech"
    --language es
    --output_dir "$folder/output"
    --do_train --do_eval
    --max_steps 4
    --per_device_train_batch_size 4
    --eval_steps 2 --save_steps 2 --logging_steps 1 --report_clips 2
    --generation_max_length 16
    --gradient_checkpointing
    "$@"
  )
  check_flags "${flags[@]}"
  mkdir -m 700 "$folder"
  make_demonstration "$folder" 8 8
  (train "${flags[@]}") # a shell of its own: train may replace it
  PYTHONPATH="$project_dir" exec "$python" -m speech_finetuning.cli.demonstration "$folder" --check "$folder/output"
}

learn() {
  set_up requirements.txt
  local folder=$calling_dir/whisper-learn
  local flags=(
    --model_name_or_path "$folder/model"
    --dataset_name "$folder/speech"
    --language es
    --output_dir "$folder/output"
    --do_train --do_eval --eval_before_training
    --max_steps 600
    --learning_rate 2e-3 --warmup_steps 50
    --per_device_train_batch_size 16 --per_device_eval_batch_size 50
    --eval_steps 200 --save_steps 200 --logging_steps 50 --report_clips 12
    "$@"
  )
  if [[ -d $folder/speech && -d $folder/model ]]; then
    say "going on in ${folder#"$calling_dir"/} (delete it to start over)"
  else
    check_flags "${flags[@]}"
    rm -rf "$folder/unfinished" "$folder/speech" "$folder/model" # of an interrupted start
    make_demonstration "$folder/unfinished" 2000 100
    mv "$folder/unfinished/"* "$folder"
    rmdir "$folder/unfinished"
  fi
  train "${flags[@]}"
}

check() {
  if [[ -z ${1:-} || $1 == --* ]]; then
    say "error: which data? Use: bash run.sh check DATA (a Hub id, a folder or a table)"
    exit 2
  fi
  set_up requirements.txt
  local data=$1 beside=
  local name=$data
  shift
  if [[ -d $data ]]; then
    name=$(cd "$data" && pwd -P)
    # Nothing is written into the folder of the data, which may be this one or one above.
    if [[ $(pwd -P)/ == "$name"/* ]]; then beside=${name%/*}/; fi
  fi
  name=${name%%\?*} # of an address
  name=$(basename "$name")
  case $(tr '[:upper:]' '[:lower:]' <<<"$name") in *.csv | *.tsv | *.json | *.jsonl | *.parquet | *.tar) name=${name%.*} ;; esac
  export NUM_PROCESSES=1
  train \
    --check_data \
    --dataset_name "$data" \
    --output_dir "${beside}check-$name" \
    "$@"
}

demo() {
  if (($# == 0)); then
    say "error: which model? Use: bash run.sh demo FOLDER (or openai/whisper-tiny, say)"
    exit 2
  fi
  set_up requirements.txt requirements-demo.txt
  exec "$python" "$project_dir/demo.py" "$@"
}

transcribe() {
  set_up requirements.txt
  PYTHONPATH="$project_dir" exec "$python" -P -m speech_finetuning.cli.transcribe "$@"
}

export_model() {
  set_up requirements.txt requirements-export.txt
  PYTHONPATH="$project_dir" exec "$python" -P -m speech_finetuning.cli.export "$@"
}

# The comment at the beginning of this file.
print_help() {
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$project_dir/run.sh"
}

run_tests() {
  set_up requirements.txt requirements-test.txt
  cd "$project_dir"
  "$python" -m ruff check --quiet . # on lines of their own: `set -e` does not see the first of an && list
  "$python" -m ruff format --quiet --check .
  "$python" -m basedpyright --pythonpath "$python"
  # Most tests wait for processes and servers: one worker per core, each with one thread of torch, takes half the time.
  OMP_NUM_THREADS=1 exec "$python" -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal "$@"
}

# The real recipe: Whisper small on the Spanish of Multilingual LibriSpeech, whose parquet files `datasets` can stream.
recipe() {
  set_up requirements.txt
  cd "$calling_dir"
  train \
    --model_name_or_path openai/whisper-small \
    --dataset_name facebook/multilingual_librispeech \
    --dataset_config_name spanish \
    --text_column_name transcript \
    --language es \
    --train_split_name train \
    --eval_split_name dev \
    --test_split_name test \
    --max_eval_samples 1000 \
    --output_dir whisper-small-es \
    --do_train --do_eval --eval_before_training \
    --max_steps 2000 \
    --warmup_steps 200 \
    --per_device_train_batch_size 16 \
    --per_device_eval_batch_size 16 \
    --gradient_accumulation_steps 2 \
    --generation_max_length 225 \
    --eval_steps 500 \
    --save_steps 500 \
    --save_total_limit 3 \
    --logging_steps 25 \
    --push_to_hub \
    "$@"
}

case "${1:-}" in
  smoke) shift; smoke "$@" ;;
  learn) shift; learn "$@" ;;
  check) shift; check "$@" ;;
  demo) shift; demo "$@" ;;
  transcribe) shift; transcribe "$@" ;;
  export) shift; export_model "$@" ;;
  test) shift; run_tests "$@" ;;
  help | -h) print_help ;;
  "" | --*) recipe "$@" ;;
  *) say "error: unknown recipe '$1'. bash run.sh help lists them."; exit 2 ;;
esac
