"""A 0.6 M parameter character model of Python's own documentation, in minutes on 2 CPU cores."""

from sedd_jax.configs import base


def get_config():
    config = base.get_config()
    config.data.corpus = "pydoc"
    config.data.tokenizer = "characters"
    config.data.length = 128
    config.data.heldout_fraction = 0.1
    config.objective.times = "stratified"
    config.model.hidden_size = 128
    config.model.blocks = 2
    config.model.heads = 4
    config.model.cond_dim = 64
    config.model.dropout = 0.0
    config.model.dtype = "float32"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.b2 = 0.99
    config.optimizer.ema_decay = 0.995
    config.train.steps = 2400
    config.train.batch_size = 16
    config.train.log_every = 20
    config.train.eval_every = 600
    config.checkpoint.every = 600
    config.evaluate.blocks = 64
    return config
