"""Detect objects with a file of tools/export_onnx.py --part detections: only ONNX Runtime, NumPy and OpenCV."""

import argparse
import json
import math

import cv2
import numpy as np
import onnxruntime

TEXTS = ('channel_order', 'config', 'mmevm_version', 'part', 'precision', 'strides', 'task', 'weights')  # others: JSON
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'area', 'lanczos')  # as OpenCV numbers them


def prepare(image, meta):
    """Return the input of the model, (1, 3, H, W), and how much width and height of the BGR image were scaled."""
    scale = 1.0, 1.0
    for step in meta['pipeline']:
        height, width = image.shape[:2]
        if step['type'] == 'Resize':
            size = step['scale']
            if step['keep_ratio']:
                factor = min(max(size) / max(height, width), min(size) / min(height, width))
                size = int(width * factor + 0.5), int(height * factor + 0.5)
            image = cv2.resize(image, size, interpolation=INTERPOLATIONS.index(step['interpolation']))
            scale = image.shape[1] / width, image.shape[0] / height
        else:  # Pad
            value = step['pad_val'] if isinstance(step['pad_val'], list) else [step['pad_val']] * 3
            size = step['size'] or ([max(height, width)] * 2 if step['pad_to_square'] else (width, height))
            right, bottom = (side + -side % (step['size_divisor'] or 1) for side in size)
            image = cv2.copyMakeBorder(image, 0, bottom - height, 0, right - width, cv2.BORDER_CONSTANT, value=value)
    image = image[..., ::-1] if meta['channel_order'] == 'RGB' else image
    x = (image.astype(np.float32) - np.float32(meta['image_mean'])) / np.float32(meta['image_std'])
    bottom, right = (-side % meta['pad_size_divisor'] for side in x.shape[:2])
    x = np.pad(x, ((0, bottom), (0, right), (0, 0)), constant_values=meta['pad_value'])
    return np.ascontiguousarray(x.transpose(2, 0, 1)[None]), scale


def paste(mask, box, size):
    """Return the mask of a box, (S, S), in an image of this height and width."""

    def weights(start, end, side, count):
        position = (np.arange(side) + 0.5 - start) / max(end - start, 1e-6) * count - 0.5
        return np.maximum(0, 1 - abs(position[:, None] - np.arange(count)))  # bilinear interpolation

    rows, columns = weights(box[1], box[3], size[0], len(mask)), weights(box[0], box[2], size[1], len(mask))
    return rows @ mask @ columns.T


def enlarge(mask, stride, scale, size):
    """Return a mask of the whole input in the size of the image."""
    height, width = mask.shape[0] * stride, mask.shape[1] * stride
    mask = cv2.resize(cv2.resize(mask, (width, height)), (math.ceil(width / scale[0]), math.ceil(height / scale[1])))
    return mask[: size[0], : size[1]]


def detect(session, image):
    """Return boxes (N, 4) in pixels of the image, scores (N), labels (N), masks (N, H, W) or None, and the metadata."""
    texts = session.get_modelmeta().custom_metadata_map
    meta = {key: text if key in TEXTS else json.loads(text) for key, text in texts.items()}
    x, scale = prepare(image, meta)
    found = dict(zip([output.name for output in session.get_outputs()], session.run(None, {'image': x}), strict=True))
    exists = found['labels'][0] >= 0  # the other rows are empty
    boxes, scores = found['dets'][0, exists, :4] / np.float32([*scale, *scale]), found['dets'][0, exists, 4]
    masks = found['masks'][0, exists] if 'masks' in found else None
    if masks is not None:
        size, stride = image.shape[:2], meta['mask_stride']
        if stride is None:  # masks within the boxes
            full = [paste(mask, box, size) for mask, box in zip(masks, boxes, strict=True)]
        else:
            full = [enlarge(mask, stride, scale, size) for mask in masks]
        masks = np.array(full).reshape(-1, *size) >= meta['mask_threshold']
    return boxes, scores, found['labels'][0, exists], masks, meta


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('model')
    parser.add_argument('image')
    parser.add_argument('--out', default='detections.png')
    parser.add_argument('--score-thr', type=float, default=0.3)
    args = parser.parse_args()
    if (picture := cv2.imread(args.image)) is None:
        parser.error(f'{args.image} cannot be read as an image.')
    session = onnxruntime.InferenceSession(args.model, providers=onnxruntime.get_available_providers())
    if not {'pipeline', 'score_threshold'} <= session.get_modelmeta().custom_metadata_map.keys():
        parser.error(f'{args.model}: export it with tools/export_onnx.py --part detections.')
    boxes, scores, labels, masks, meta = detect(session, picture)
    for i in np.flatnonzero(scores >= args.score_thr):
        name = meta['classes'][labels[i]] if 'classes' in meta else f'class {labels[i]}'
        color = meta['palette'][labels[i]][::-1] if 'palette' in meta else (0, 255, 0)
        x1, y1, x2, y2 = (round(float(side)) for side in boxes[i])
        print(f'{name} {scores[i]:.2f} at {x1}, {y1}, {x2}, {y2}')
        if masks is not None:
            picture[masks[i]] = picture[masks[i]] // 2 + np.uint8(color) // 2
        cv2.rectangle(picture, (x1, y1), (x2, y2), color, 2)
        cv2.putText(picture, f'{name} {scores[i]:.2f}', (x1, y1 - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.5, color, 1)
    cv2.imwrite(args.out, picture)
    print(f'wrote {args.out}')
