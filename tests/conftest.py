"""What all tests share."""

import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# A shared machine may take its time with any one example.
settings.register_profile("trady", deadline=None)
settings.load_profile("trady")

# In the background of a script Ctrl-C is switched off, also for what the tests start; some of them press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def no_priors_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What ``trady rank`` has kept in somebody's home must not decide a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRADY_PRIORS", str(tmp_path_factory.mktemp("priors")))
        yield
