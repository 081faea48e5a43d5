"""Every key, with its unit. The other configs are this one and a few lines of difference.

Values are the paper's for SEDD small on OpenWebText: batch 512, AdamW at 3e-4, EMA 0.9999.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 0  # of parameters, noise, dropout and data order
    # Modules, names or .py files, that register schedules, graphs, objectives, predictors, grids or
    # corpora of your own: docs/extend.md. Their parameters are in the sections' `parameters`
    config.imports = ()

    config.data = ml_collections.ConfigDict()
    # text (your own files), pydoc (ships with Python), a published one: text8, wikitext2,
    # wikitext103, ptb, lambada, lm1b, openwebtext, or tfds:NAME[/CONFIG][:VERSION]
    config.data.corpus = "text"
    # text: a file or folder of .txt, .md (a document each), .jsonl ({"text": ...} a line), .csv or
    # .parquet (column text) files, split by names such as train/ and valid.jsonl; a published
    # corpus: folder with its archive or files, empty to download them; tfds: TFDS's data_dir
    config.data.path = ""
    config.data.parameters = ml_collections.ConfigDict()  # of a corpus of your own
    config.data.tokenizer = "gpt2"  # gpt2, bert, json, sentencepiece, text8, ...
    # gpt2, bert, json (a tokenizer.json of the `tokenizers` library): its folder, the file or
    # hub id@commit, empty for the published GPT-2 or BERT;
    # sentencepiece: .model file, or train:8000 for a vocabulary of 8000
    config.data.tokenizer_path = ""
    config.data.length = 1024  # tokens in a block
    config.data.form = "packed"  # packed: documents one after the other; padded: one a block
    config.data.windows = "aligned"  # aligned blocks, or random: any L tokens in a row (packed)
    config.data.train_split = "train"
    config.data.heldout_split = "validation"
    config.data.heldout_fraction = 0.05  # of documents, where the corpus has no splits
    # Folder of sedd-prepare, whose corpus and tokenizer hold then; empty: WORKDIR/records, made on
    # first use
    config.data.records = ""

    config.graph = ml_collections.ConfigDict()
    config.graph.name = "absorbing"  # absorbing or uniform
    config.graph.scale_by_sigma = True  # absorbing: log_score = logits - log expm1(sigma) - log V
    config.graph.parameters = ml_collections.ConfigDict()  # of a graph of your own

    config.schedule = ml_collections.ConfigDict()
    config.schedule.name = "log_linear"  # log_linear or geometric
    config.schedule.eps = 1e-3  # log_linear: share of the tokens still clean at t = 1
    config.schedule.sigma_min = 1e-5  # geometric: total noise at t = 0
    config.schedule.sigma_max = 20.0  # geometric: total noise at t = 1
    config.schedule.parameters = ml_collections.ConfigDict()  # of a schedule of your own

    config.objective = ml_collections.ConfigDict()
    # dwdse (the paper's score entropy), or a rival: normalised (MDLM, MD4, RADD; uniform noise:
    # UDLM, Duo), unweighted,
    # concrete_score_matching, d3pm, autoregressive, plaid
    config.objective.name = "dwdse"
    config.objective.t_min = 1e-3  # times are drawn from [t_min, 1]
    config.objective.times = "independent"  # independent (the paper) or stratified over the batch
    config.objective.discrete_steps = 1000  # d3pm: noise levels
    config.objective.embedding_dim = 16  # plaid: of the tokens' embeddings, which it noises
    config.objective.parameters = ml_collections.ConfigDict()  # of an objective of your own

    config.model = ml_collections.ConfigDict()
    config.model.hidden_size = 768
    config.model.blocks = 12
    config.model.heads = 12
    config.model.cond_dim = 128  # width of the noise level's embedding
    config.model.time_conditioning = True  # False: the network does not see the noise level
    # What it sees of it: sigma, or the share of the tokens that are noised, 1 - exp(-sigma) (GIDD)
    config.model.noise_input = "sigma"
    config.model.dropout = 0.1  # probability
    config.model.dtype = "bfloat16"  # of the matmuls: float32 or bfloat16
    config.model.residual_dtype = "float32"  # of the residual stream; bfloat16: half its memory
    # What the backward pass recomputes, for less memory and more time: none (but GELU), elementwise
    # (all elementwise steps: norms, dropout, sums), blocks (all)
    config.model.remat = "none"
    config.model.attention = "auto"  # what suits the device, or xla, cudnn (GPU), splash (TPU)

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 2500  # linear, from 1/2500 of the rate to all of it
    # Share of train.steps, at their end, over which the rate falls linearly to 0; 0: it stays (the
    # paper). A run that goes on with more train.steps has the rate that they say
    config.optimizer.decay_fraction = 0.0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0
    # Of the first moments: bfloat16 takes 2 bytes less a parameter. The second moments are always
    # float32: in bfloat16 a change of 1 - b2 would be rounded away
    config.optimizer.mu_dtype = "float32"
    config.optimizer.clip_norm = 1.0  # global norm of the gradient
    config.optimizer.ema_decay = 0.9999

    config.train = ml_collections.ConfigDict()
    config.train.steps = 1_300_000
    config.train.batch_size = 512  # sequences a step, over all devices
    config.train.microbatches = 1  # parts of a batch whose gradients are averaged
    config.train.log_every = 50  # steps
    config.train.eval_every = 5000  # steps
    config.train.max_skipped = 50  # steps skipped in a row, for loss or gradient not finite
    # The process ends after so long without a step, batch or save (compiling counts); 0: never
    config.train.stuck_seconds = 3600
    # Where metrics and samples go beside the run's files: tensorboard, wandb, or both with a comma
    config.train.trackers = "tensorboard"

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = 10_000  # steps
    config.checkpoint.keep = 3  # how many of the newest are not deleted

    config.evaluate = ml_collections.ConfigDict()
    config.evaluate.blocks = 256  # held-out blocks scored while training; sedd-eval scores all
    config.evaluate.batch_size = 32  # blocks a network call
    config.evaluate.passes = 8  # noise levels a block; even

    config.sample = ml_collections.ConfigDict()
    config.sample.predictor = "tweedie"  # or euler, none, two_stage and more: docs/samplers.md
    config.sample.steps = 128
    config.sample.t_min = 1e-5  # time of the final denoising
    config.sample.draw = "exact"  # exact, or float32_gumbel: the original's, rare tokens underdrawn
    config.sample.grid = "uniform"  # times of the steps: uniform, or cosine: short ones first
    config.sample.parameters = ml_collections.ConfigDict()  # of a predictor or grid of your own
    config.sample.every = 0  # steps of training between samples in WORKDIR/samples; 0: none
    config.sample.count = 4  # samples each time

    config.profile = ml_collections.ConfigDict()
    config.profile.start = 0  # first step of the profile in WORKDIR/profile
    config.profile.steps = 0  # steps profiled; 0: none

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1  # devices the batch is split over; -1: all that the other axes leave
    config.mesh.fsdp = 1  # devices the batch and the parameters are split over
    config.mesh.tensor = 1  # devices heads and MLP are split over
    return config


def with_uniform_noise(config):
    """The paper's uniform noise: geometric schedule 1e-5..20, logits that are the log-scores."""
    config.graph.name = "uniform"
    config.graph.scale_by_sigma = False
    config.schedule.name = "geometric"
    return config


# Machines, and how 512 blocks of 1024 tokens are cut on them: devices, then for SEDD small and for
# medium fsdp (devices that share the state; the others copy it), microbatches, remat. Cloud names
# count cores for v4 and v5p, two a chip, and chips for v5e and v6e; a chip is a device. A100s are
# taken to have 40 GB. Estimates, see on_hardware.
HARDWARE = {
    "a100x8": (8, (1, 1, "none"), (1, 4, "none")),
    "a100x16": (16, (1, 1, "none"), (1, 2, "none")),
    "h100x8": (8, (1, 1, "none"), (1, 2, "none")),
    "v4-64": (32, (1, 1, "none"), (1, 2, "none")),
    "v5e-16": (16, (1, 2, "none"), (4, 4, "none")),
    "v5e-64": (64, (1, 1, "none"), (4, 1, "none")),
    "v5e-256": (256, (1, 1, "none"), (4, 1, "none")),
    "v5p-64": (32, (1, 1, "none"), (1, 1, "none")),
    "v6e-64": (64, (1, 1, "none"), (1, 1, "none")),
}


def on_hardware(config, hardware):
    """config as HARDWARE cuts it, as in --config=openwebtext_small.py:v5e-64; "" leaves it alone.

    Expected memory: see docs/scaling.md. Microbatches draw their noise apart, so they belong to the
    experiment; the mesh may change when a run is resumed (--config.mesh.data=-1 fits it to any).
    """
    if not hardware:
        return config
    if hardware not in HARDWARE:
        raise ValueError(f"unknown hardware {hardware!r}; known: {', '.join(HARDWARE)}")
    devices, small, medium = HARDWARE[hardware]
    fsdp, microbatches, remat = medium if config.model.blocks > 12 else small
    config.mesh.data = devices // fsdp
    config.mesh.fsdp = fsdp
    config.train.microbatches = microbatches
    config.model.remat = remat
    return config
