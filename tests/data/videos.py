"""Make small videos whose frames tell their number, encoded by PyAV."""

import av
import numpy as np

SIZE = (64, 48)


def frame(number, seed=0, size=SIZE):
    """Return an RGB frame: a gradient that moves, and the number as a row of 8 black or white boxes."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([(x * 2 + number * 3) % 256, (y * 3 + seed * 40) % 256, (x + y + number * 5) % 256], -1)
    pixels = pixels // 2 + 64
    for bit in range(8):
        pixels[8:16, 8 * bit : 8 * bit + 8] = 255 * (number >> bit & 1)
    return pixels.astype(np.uint8)


def number_of(pixels):
    """Return the number that a frame (48, 64, 3) tells."""
    boxes = pixels[10:14].mean((0, 2)).reshape(8, 8)[:, 2:6].mean(1)
    return int(((boxes > 128) << np.arange(8)).sum())


def write(
    path,
    frames=30,
    codec="libx264",
    seed=0,
    gop=12,
    times=None,
    pixels="yuv420p",
    options=None,
    rotation=None,
    size=SIZE,
    b_frames=2,
):
    """Write a video of `frames` frames, shown at `times` (each one after the other without them), and return its path.

    `b_frames`: frames between others that refer to both.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.gop_size, stream.codec_context.thread_count = gop, 1
        if codec in ("libx264", "mpeg4", "mpeg2video"):
            stream.codec_context.max_b_frames = b_frames
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            image = av.VideoFrame.from_ndarray(frame(number, seed, size), format="rgb24")
            image.pts = number if times is None else times[number]
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    return path


def decoded(path):
    """Return all frames of a video, by decoding it from its beginning."""
    with av.open(str(path)) as container:
        return [image.to_ndarray(format="rgb24") for image in container.decode(video=0)]


def copied(path, to, keep, options=None):
    """Write the packets of a video for whose number `keep` is true, without encoding them again."""
    with av.open(str(path)) as source, av.open(str(to), "w", options=options or {}) as container:
        stream = source.streams.video[0]
        out = container.add_stream_from_template(stream)
        for number, packet in enumerate(source.demux(stream)):
            if packet.dts is not None and keep(number):
                packet.stream = out
                container.mux(packet)
    return to
