"""How cliptune-mini and cliptune-mini-vit were made, and how to make them again: `python -m scripts.mini`.

    prepare   packages from the configured registries → images, captions, sentences: one folder below 60 MB
    images    image towers: the head of Lite0 onto the teacher's space; the ViT taught by it
    texts     text towers: small transformers taught by the teacher
    pack      fp16 weights, configurations, model cards, checksums → mini/cliptune_mini
    probe     held-out pictures for the forgetting guard, as they are shipped → mini/cliptune_mini

Each step up to `pack` reads the folder that the one before it wrote. A GPU makes `images` and `texts` quick;
they run on a CPU too.
"""
