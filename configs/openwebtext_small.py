"""SEDD small on OpenWebText (Table 1): 169.6 M parameters, 1024 GPT-2 tokens, batch 512.

Needs --config.data.path (text files or JSON lines) and --config.data.tokenizer_path (GPT-2's
encoder.json and vocab.bpe). The paper reports numbers after 400 k of the 1.3 M steps: zero-shot
perplexity LAMBADA 50.92, WikiText2 41.84, PTB 114.24, WikiText103 40.62, 1BW 79.29.
"""

from sedd_jax.configs import base


def get_config():
    return base.get_config()
