"""A 0.8 M-parameter model of Python's own documentation, in minutes on 2 CPU cores."""

from sedd_jax.configs import base


def get_config():
    config = base.get_config()
    config.data.corpus = "pydoc"
    config.data.tokenizer = "sentencepiece"
    config.data.tokenizer_path = "train:1024"
    config.data.length = 64
    config.data.windows = "random"  # the corpus is small: no block is seen twice as it was
    config.data.heldout_fraction = 0.1
    config.objective.times = "stratified"
    config.model.hidden_size = 128
    config.model.blocks = 2
    config.model.heads = 4
    config.model.cond_dim = 64
    config.model.dropout = 0.0
    config.model.dtype = "float32"
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_steps = 300
    config.optimizer.decay_fraction = 0.5
    config.optimizer.b2 = 0.98
    config.optimizer.ema_decay = 0.995
    config.train.steps = 6000
    config.train.batch_size = 16
    config.train.log_every = 20
    config.train.eval_every = 1000
    config.checkpoint.every = 1000
    config.evaluate.blocks = 64
    return config
