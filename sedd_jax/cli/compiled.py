"""Where the commands keep what they compiled, so that the next one loads it."""

import hashlib
import logging
import os
import platform
from pathlib import Path

log = logging.getLogger(__name__)

# Of compiling, from which on a program is stored: all are. A bound of a small model took 10.1 s
# without, 6.0 s with the programs of 0.1 s and more, 4.4 s with all 101 of them, which have 1.3 MB.
SECONDS = 0.0
MAX_BYTES = 2**30  # of all programs; those that were not used for longest go


def keep_compiled() -> None:
    """Lets jax store compiled programs in the user's cache folder, and load them from there.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=0 turns it off:
    both are jax's own. A folder that cannot be written is a warning.
    """
    import jax

    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{str(folder)!r} is not writable")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        log.warning("what is compiled is not stored for the next time: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)


def cache_folder() -> Path:
    """sedd_jax/compiled and the kind of this CPU in XDG_CACHE_HOME or ~/.cache.

    jax's keys do not tell CPUs apart, and a home may be shared by machines of different ones, where
    a program may have instructions that another machine lacks.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = base if base.is_absolute() else Path.home() / ".cache"
    return base / "sedd_jax" / "compiled" / f"{platform.machine()}-{_cpu_digest()}"


def _cpu_digest() -> str:
    """Eight digits that differ between CPUs of different instructions, where Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256((features or platform.processor()).encode()).hexdigest()[:8]
