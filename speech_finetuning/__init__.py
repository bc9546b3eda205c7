"""What has to hold whatever the training script changes. Floors, each imports only what stands to its left:

    base      errors, rejections, files, responses, network, threads, children, shutdown: knows no speech
    data      audio, containers, signatures, ffmpeg, long_audio, cuts, reading, addresses, text, oddities, segments,
              encodings, tables, columns, guessing, features, cells, listed, places, annotations, manifests, subtitles,
              recordings, kaldi, saved, footers, row_counts, builders, dataset_names, tars, parquet_windows, sources,
              shards, positions, selection, preprocessing, roles, row_keys, hold_out, row_table, units, passes,
              row_check, data_check, augmentation, noise, nonspeech, prompts, items, stream, packing, batches:
              bytes to examples
    model     checkpoint_folder, loading, languages, adapters, windows, generation, recogniser, prompting,
              transcription: the checkpoint, its language, its window
    scoring   normalization, metrics, eval_sets, scores, score_table, guards, scorecard,
              alignment, differences, predictions:
              rows to numbers that cannot flatter
    training  arguments, loss, settings, phases, progress, checkpoints, callbacks, meter, resumable, reading_worker,
              trainer, stages, averaging, reload_check, length, memory, compat: Seq2SeqTrainer, the few overrides
    sharing   claim, uploads, upload_process, snapshot, public, hub, model_card, examples, reports, run_info,
              report_page, report_findings, report_rows, report_clips, report_sounds, report_charts, report_pictures,
              picture_process: what others see
    cli       early_exit, help, flags, source_flags, retired, translation, parsing, guards, checks, devices,
              precision, terminal, silenced, console, data_report, check_data, model_check, run_lines, run_screen,
              next_steps, dry_run, demonstration, exit_status, out_of_memory, transcribe, subtitles, export,
              window_choice: what the terminal sees

The script run_speech_recognition_seq2seq_streaming.py stands on all of them; nothing here imports it.
"""

import os

# Threads of our own pool tokenise; a fork after that would only bring warnings.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
