"""What happens when the network fails? Retries with exponential backoff, for a stated time.

Used where files or rows come from the Hub. An image's address is fetched by model/images.py, with limits of its own.
"""
import time

from model.errors import warn

AT_START = 7                                    # seconds of trouble before anything was reached: somebody is watching
LONGEST_PAUSE = 60                              # seconds between two tries


def is_transient(error):
    """Whether an error may go away by itself: a network that refuses, stalls or breaks off, a Hub that is overloaded."""
    from huggingface_hub.errors import (
        HTTPError,  # of the HTTP library that this release uses
    )
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in (408, 429) or response.status_code >= 500
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        return True
    cause = error.__cause__ or error.__context__                        # "not in the cache", because the Hub did not answer
    return isinstance(error, OSError) and cause is not None and is_transient(cause)


class Backoff:
    """Pauses between tries: 1, 2, 4, ... 60 seconds, each told in one line, until `seconds` of trouble have passed."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.over()

    def over(self):
        """The trouble is over: the next one is a new one."""
        self.began, self.pause = None, 1

    def wait(self, error):
        """Pause before the next try; returns whether there is to be one."""
        now = time.monotonic()
        self.began = now if self.began is None else self.began
        if now + self.pause > self.began + self.seconds:
            return False
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        warn(f"no answer from the network ({reason}); trying again in {self.pause} s, giving up after {self.seconds} s")
        time.sleep(self.pause)
        self.pause = min(2 * self.pause, LONGEST_PAUSE)
        return True


def retry(call, seconds=AT_START):
    """`call()`, again and again while the network is in trouble; its last error when `seconds` are over."""
    patience = Backoff(seconds)
    patience.began = time.monotonic()           # the libraries wait and try again themselves: that counts
    while True:
        try:
            return call()
        except Exception as error:              # which classes a Hub library raises differs between its releases
            if not is_transient(error) or not patience.wait(error):
                raise
