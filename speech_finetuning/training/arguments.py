"""What transformers' Trainer needs to find in its arguments, whatever the user gave."""

import transformers


def settle_for_library(
    args: transformers.Seq2SeqTrainingArguments, config: transformers.WhisperConfig
) -> None:
    """Fills in, or corrects, what the library would take in another sense. The number of steps is
    known by now."""
    # Schedule-free optimisers take the number as it is: no fraction.
    args.warmup_steps = args.get_warmup_steps(args.max_steps)
    if args.num_train_epochs is None:
        args.num_train_epochs = 0.0  # the library compares it with a number
    if args.ddp_find_unused_parameters is None:
        # The library looks for them in every step; only layerdrop has any.
        layerdrop = config.encoder_layerdrop + config.decoder_layerdrop
        args.ddp_find_unused_parameters = layerdrop > 0
    if args.data_seed is None:
        args.data_seed = args.seed
    args.ignore_data_skip = True  # the stream continues from its own position
    if args.load_best_model_at_end and args.save_total_limit == 1:
        # With a limit of 1 the library deletes the newest checkpoint in favour of the best, so that
        # a restart would repeat steps.
        args.save_total_limit = 2
