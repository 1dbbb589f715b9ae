"""What happens when the network fails or lies? Trouble is told and tried again, for a stated time; fetching has limits.

Used where files or rows come from the Hub (`retry`, `Backoff`) and where an image is named by an address (`fetch`).
"""
import http.client
import ipaddress
import queue
import threading
import time
import urllib.request

from model.errors import InputError, warn

AT_START = 7                                    # seconds of trouble before anything was reached: somebody is watching
LONGEST_PAUSE = 60                              # seconds between two tries
FETCH_SECONDS, FETCH_BYTES = 20, 50_000_000     # longest time and largest size of what is behind an address


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


# -------------------------------------------------------------------------------------------------------------- addresses

class Guarded:
    """A connection that refuses a peer in a private network: an address, or a redirect, must not reach what only we can."""

    def connect(self):
        super().connect()
        peer = ipaddress.ip_address(self.sock.getpeername()[0].partition("%")[0])
        peer = getattr(peer, "ipv4_mapped", None) or peer
        if not peer.is_global or peer.is_multicast:
            self.close()
            raise OSError(f"{self.host} is {peer}, an address of a private network; --allow-private lets it be fetched")


class GuardedHTTP(Guarded, http.client.HTTPConnection):
    pass


class GuardedHTTPS(Guarded, http.client.HTTPSConnection):
    pass


def opener(allow_private):
    """Opens http and https addresses and their redirects, nothing else (no ftp, no file)."""
    class HTTP(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(http.client.HTTPConnection if allow_private else GuardedHTTP, request)

    class HTTPS(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(http.client.HTTPSConnection if allow_private else GuardedHTTPS, request)

    director = urllib.request.OpenerDirector()
    for handler in (HTTP, HTTPS, urllib.request.ProxyHandler, urllib.request.HTTPRedirectHandler, urllib.request.UnknownHandler,
                    urllib.request.HTTPErrorProcessor, urllib.request.HTTPDefaultErrorHandler):
        director.add_handler(handler())
    return director


def fetch(address, allow_private=False):
    """The bytes behind an http(s) address. Raises InputError for what fails, is too large, too slow or private."""
    answer = queue.Queue()

    def work():
        try:
            with opener(allow_private).open(address, timeout=FETCH_SECONDS) as response:
                answer.put(response.read(FETCH_BYTES + 1))
        except Exception as error:              # told by the thread that waits
            answer.put(error)

    threading.Thread(target=work, daemon=True).start()      # its time is bounded as a whole, whatever drips in byte by byte
    try:
        data = answer.get(timeout=FETCH_SECONDS)
    except queue.Empty:
        raise InputError(f"{address}: cannot be fetched (not whole after {FETCH_SECONDS} seconds)") from None
    if isinstance(data, (OSError, ValueError, http.client.HTTPException)):
        raise InputError(f"{address}: cannot be fetched ({data})") from data
    if isinstance(data, Exception):
        raise data
    if len(data) > FETCH_BYTES:
        raise InputError(f"{address}: more than {FETCH_BYTES:,} bytes; expected an image")
    return data
