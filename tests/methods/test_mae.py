import torch
from segment_anything.modeling import Sam

from samssl.methods.mae import MaeConfig, MaskedAutoencoder


def test_gradients_are_the_same_bit_for_bit_every_time(micro_sam: Sam) -> None:
    """With several threads, gradients that are added up in any order differ in their last bits."""
    model = MaskedAutoencoder(
        micro_sam.image_encoder, MaeConfig(decoder_depth=1, decoder_dim=32, decoder_heads=2), image_size=64
    )
    batch = {"image": torch.rand(32, 1, 64, 64), "key": torch.arange(32)}
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    gradients = []
    for _ in range(8):
        model.zero_grad()
        model(batch)["loss"].backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.set_num_threads(threads)
    for repeated in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert torch.equal(repeated[name], gradient), name
