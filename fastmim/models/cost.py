"""FLOPs of a training step of a masked autoencoder: matrix products, two FLOPs for a multiply and an add."""


def step_flops(
    values: int,
    width: int,
    depth: int,
    decoder_width: int,
    decoder_depth: int,
    *,
    embedded: int,
    visible: int,
    decoded: int,
    queries: int,
    scored: int,
) -> int:
    """Return the FLOPs of the forward and backward pass of one image through a masked autoencoder.

    Args:
        values: values of a patch.
        width, depth, decoder_width, decoder_depth: of encoder and decoder, whose MLPs are four times as wide.
        embedded: patches that are embedded.
        visible: tokens in the encoder.
        decoded: tokens in the decoder.
        queries: tokens that the last decoder block computes.
        scored: tokens that the prediction head computes.
    """
    forward = depth * _block(width, visible, visible)
    forward += 2 * visible * width * decoder_width
    if decoder_depth:
        forward += (decoder_depth - 1) * _block(decoder_width, decoded, decoded)
        forward += _block(decoder_width, queries, decoded)
    forward += 2 * scored * decoder_width * values
    # images need no gradient, so embedding has one product in its backward pass, the others two
    return 3 * forward + 2 * (2 * embedded * values * width)


def _block(width: int, queries: int, tokens: int) -> int:
    """Return the FLOPs of a block's forward pass, of which the last `queries` tokens are computed."""
    keys_values = 2 * tokens * 2 * width**2
    attention = 2 * 2 * queries * tokens * width
    queries_projection_mlp = 2 * queries * 10 * width**2
    return keys_values + attention + queries_projection_mlp
