"""The MISS network (Chen et al. 2024, arXiv 2401.05163) for medical visual question answering.

Three transformers in a row:

1. `vision.VisionTransformer` encodes an image: [images, 1 + patches, width].
2. `text.TextModel` encodes a question, and in every layer its tokens attend to the image states by
   cross-attention (the paper's joint text-multimodal encoder, JTM): [questions, length, width].
3. `text.TextDecoder` writes the answer token by token; it attends to the question states only.

`model.MissForQuestionAnswering` joins them. All questions of one image share its states: the image is encoded
once, and each text layer computes the keys and values of the image once (`attention.QuerySlots`). The same
network with other weights is BLIP-VQA (Li et al. 2022, arXiv 2201.12086). Modules and parameters have the
names of MISS's checkpoints.
"""
