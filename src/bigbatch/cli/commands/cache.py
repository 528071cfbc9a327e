"""``bigbatch cache``: list the entries of the token cache, and remove them."""

import time
from datetime import datetime

from bigbatch.cli.console import make_console
from bigbatch.cli.exit_codes import DONE
from bigbatch.cli.options import CacheOptions
from bigbatch.lm.data.token_store.cache import Cache, default_cache
from bigbatch.memory.limit import describe_bytes

DAY_S = 86_400


def run(options: CacheOptions) -> int:
    """Print the entries, and remove them on request."""
    console = make_console()
    cache = Cache(options.cache or default_cache())
    before_s = time.time() - options.unused_for * DAY_S
    found = [entry for entry in cache.entries() if entry.used_s <= before_s]
    if options.remove:
        cache.remove(found)
    for entry in found:
        used = datetime.fromtimestamp(entry.used_s).strftime("%Y-%m-%d %H:%M")
        console.print(f"{describe_bytes(entry.num_bytes):>10}  used {used}  {entry.describe()}")
    total = describe_bytes(sum(entry.num_bytes for entry in found))
    done = "removed" if options.remove else "in"
    number = f"{len(found):,} {'entry' if len(found) == 1 else 'entries'}"
    console.print(f"{number}, {total}, {done} {cache.root}")
    return DONE
