"""LitServe with open_clip's eager forward, as one would write it by hand: a peer of the serving benchmark.

`PYTHON bench/litserve_app.py FOLDER PORT THREADS` serves an exported model's image tower: a file in a form
in, an embedding out, batches of up to 32. Run by `litserve_peer.py` in an environment of its own, which has
litserve beside torch and open_clip; imports nothing of ours.
"""

from __future__ import annotations

import io
import sys

import litserve  # type: ignore[import-not-found]
import open_clip
import PIL.Image
import torch

BATCH = 32


class ImageTower(litserve.LitAPI):  # type: ignore[misc]
    """One worker."""

    def setup(self, device: str) -> None:
        """In the worker's process."""
        torch.set_num_threads(int(sys.argv[3]))
        self.model, self.preprocess = open_clip.create_model_from_pretrained(f"local-dir:{sys.argv[1]}")

    # LitServe takes an annotation for the form of a JSON body, and its absence for any request.
    def decode_request(self, request) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """A form with a file → [3, H, W]."""
        with PIL.Image.open(io.BytesIO(request["image"].file.read())) as image:
            found: torch.Tensor = self.preprocess(image)
        return found

    def batch(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """[N, 3, H, W]."""
        return torch.stack(inputs)

    @torch.inference_mode()
    def predict(self, batch: torch.Tensor) -> torch.Tensor:
        """[N, D]."""
        found: torch.Tensor = self.model.encode_image(batch, normalize=True)
        return found

    def unbatch(self, output: torch.Tensor) -> list[torch.Tensor]:
        """[D] each."""
        return list(output)

    def encode_response(self, output: torch.Tensor) -> dict[str, list[float]]:
        """As JSON."""
        return {"embedding": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(
        ImageTower(max_batch_size=BATCH, batch_timeout=0.01), accelerator="cpu", timeout=600
    )
    server.run(host="127.0.0.1", port=int(sys.argv[2]), log_level="error", generate_client_file=False)
