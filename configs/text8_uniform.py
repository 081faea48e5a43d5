"""text8 with uniform noise (Table 2): geometric schedule 1e-5..20; the paper has 1.47 BPC."""

from sedd_jax.configs import text8


def get_config():
    config = text8.get_config()
    config.graph.name = "uniform"
    config.graph.scale_by_sigma = False
    config.schedule.name = "geometric"
    return config
