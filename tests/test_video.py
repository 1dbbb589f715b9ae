"""The frames of a video are those of the official sampling; the model reads them as the reference does."""
import os

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image
from reference import conversation_prompt, reference_model
from test_generate import reference_answer

from extras.video import frame_places, read_video
from model import InputError
from model.tiling import tile_page


@pytest.fixture(params=["gif", "webp", "png"])
def video(request, tmp_path):
    """20 frames of a tenth of a second; frame i is of grey 12 i."""
    frames = [Image.new("RGB", (40, 30), (12 * i,) * 3) for i in range(20)]
    frames[0].save(tmp_path / f"clip.{request.param}", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    return tmp_path / f"clip.{request.param}"


def official_places(last, n, per_second=1.0, bound=(-100000, 100000)):
    """The formula of the model card, in NumPy."""
    first, end = max(0, round(bound[0] * per_second)), min(round(bound[1] * per_second), last)
    part = float(end - first) / n
    return [int(first + part / 2 + np.round(part * i)) for i in range(n)]


def test_frame_places_are_the_official_ones():
    assert frame_places(240, 8) == [14, 44, 74, 104, 134, 163, 193, 223]
    assert frame_places(100, 8) == [6, 18, 31, 43, 56, 68, 80, 93]
    assert frame_places(240, 8, 30, (2, 6)) == [67, 82, 97, 112, 127, 142, 157, 172]
    for count in range(1, 200):
        for n in (1, 3, 8, 32):
            assert frame_places(count, n) == official_places(count - 1, n)
            assert frame_places(count, n, 24.5, (0.5, 3)) == official_places(count - 1, n, 24.5, (0.5, 3)) or count < 13


def test_the_frames_seen_are_those_at_the_places(video):
    def greys(frames):
        return [frame.getpixel((20, 15))[0] / 12 for frame in frames]
    assert all(frame.mode == "RGB" and frame.size == (40, 30) for frame in read_video(video))
    assert greys(read_video(video)) == pytest.approx(frame_places(20, 8), abs=0.3)
    assert greys(read_video(video, 4, (0.5, 1.5))) == pytest.approx(frame_places(20, 4, 10, (0.5, 1.5)), abs=0.3)
    assert greys(read_video(video, 50)) == pytest.approx(frame_places(20, 50), abs=0.3)         # more than there are


@pytest.mark.parametrize("name, span, message", [
    ("nowhere.gif", None, "cannot be read as an animation"), ("text.webp", None, "cannot be read as an animation"),
    ("clip.gif", (5, 6), "no frames from second 5 to 6; it has 4 in 0.4 seconds"), ("clip.gif", (0.2, 0.1), "no frames from second")])
def test_a_video_that_cannot_be_read_is_told(tmp_path, name, span, message):
    frames = [Image.effect_noise((8, 8), 90) for _ in range(4)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    (tmp_path / "text.webp").write_text("no animation")
    with pytest.raises(InputError, match=message):
        read_video(tmp_path / name, 8, span)


def test_a_video_is_a_file_on_this_machine(tmp_path):
    os.mkfifo(tmp_path / "clip.mp4")                                        # reading it would wait for ever
    for path in ("http://127.0.0.1:9/clip.mp4", "concat://x.gif", tmp_path / "clip.mp4", tmp_path):
        with pytest.raises(InputError, match="not a file; expected a video"):
            read_video(path)


def test_a_video_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(InputError, match="pip install av"):
        read_video(tmp_path / "clip.mp4")


def test_8_frames_are_answered_as_by_the_reference(tiny, tmp_path):
    frames = [Image.effect_noise((90 + 10 * i, 100), 90) for i in range(8)]
    chat = tiny.chat(max_new_tokens=12)
    chat.add_video(frames)
    chat.ask("What happens?")
    tiles = torch.cat([torch.from_numpy(tile_page(frame, 1, 128)) for frame in frames])
    lines = "".join(f"Frame{i}: <image>\n" for i in range(1, 9))
    prompt = conversation_prompt(tiny.tokenizer, tiny.config.tokens_per_tile, [1] * 8, [(lines + "What happens?", None)])
    assert chat.report["tiles"] == [1] * 8 and chat.report["prompt_tokens"] == len(prompt.ids)
    assert chat.report["tokens"] == reference_answer(reference_model(tiny), tiny, tiles, prompt, 12)


def test_the_red_panda_is_sampled_as_officially():
    av = pytest.importorskip("av", reason="needs the package av")
    path = SHARED / "examples" / "red-panda.mp4"
    if not path.exists():
        pytest.skip("needs the video red-panda.mp4, which is not part of this repository")
    with av.open(str(path)) as container:
        every = [frame.to_image().resize((32, 32)).tobytes() for frame in container.decode(video=0)]
    seen = [frame.resize((32, 32)).tobytes() for frame in read_video(path)]
    assert seen == [every[place] for place in official_places(len(every) - 1, 8)]
