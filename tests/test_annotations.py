"""What annotations and image files may be: trained on, or refused by name, or left out and counted as mmdet does it."""

import json
import re

import cv2
import numpy as np
import pytest
from command_line import ROOT, run, the_sentence
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from mmevm.cli import replace_data_root
from mmevm.preflight import ConfigError, check_annotations

CONFIG = ROOT / 'configs/demo/maskrcnn_evm_m1_shapes.py'
KEY = 'train_dataloader.dataset'
SIDE = 64
SQUARE = [[10, 10, 40, 10, 40, 40, 10, 40]]


def image(id_, **changes):
    return dict(id=id_, file_name=f'{id_}.png', width=SIDE, height=SIDE) | changes


def annotation(id_, image_id=1, **changes):
    box = dict(bbox=[10, 10, 30, 30], area=900, iscrowd=0, segmentation=SQUARE)
    return dict(id=id_, image_id=image_id, category_id=1) | box | changes


def write(root, images, annotations, categories=({'id': 1, 'name': 'shape'}, {'id': 7, 'name': 'other'}), files=True):
    """Data as the demo's config reads them, for training and evaluation alike."""
    for split in ('train', 'val'):
        (root / split).mkdir(exist_ok=True)
        for entry in images if files else ():
            path = root / split / entry['file_name']
            if not path.exists():
                cv2.imwrite(str(path), np.full((entry['height'], entry['width'], 3), 127, np.uint8))
    (root / 'annotations').mkdir(exist_ok=True)
    whole = dict(images=list(images), annotations=list(annotations), categories=list(categories))
    for split in ('train', 'val'):
        (root / f'annotations/instances_{split}.json').write_text(json.dumps(whole))


DEMO = Config.fromfile(CONFIG)
DIGITS = Config.fromfile(ROOT / 'configs/demo/evm_m1_digits.py')


def read(root, **changes):
    cfg = replace_data_root(DEMO, str(root))
    cfg.train_dataloader.dataset.update(changes)
    return cfg


def build(cfg):
    init_default_scope('mmdet')
    return DATASETS.build(cfg.train_dataloader.dataset)


def told(cfg):
    (note,) = check_annotations(cfg, ['train', 'val'])
    return note


def refusal(cfg, *splits):
    with pytest.raises(ConfigError) as error:
        check_annotations(cfg, splits or ['train', 'val'])
    return str(error.value)


numbers = st.one_of(st.integers(-20, 80), st.sampled_from([0, 0.5, 1, 31, 32, 64]), st.floats(-5, 70))
images = st.builds(dict, width=st.integers(1, 80), height=st.integers(1, 80))
annotations = st.builds(
    dict,
    image_id=st.integers(0, 6),  # 0 and the last are of no image
    category_id=st.sampled_from([1, 1, 1, 7, 99]),
    bbox=st.lists(numbers, min_size=4, max_size=4),
    area=st.sampled_from([0, -1, 0.5, 20, 400]),
    iscrowd=st.booleans().map(int),
    ignore=st.sampled_from([False, False, False, True]),
)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(images, min_size=1, max_size=5),
    st.lists(annotations, max_size=25),
    st.sampled_from([None, dict(filter_empty_gt=True, min_size=32), dict(min_size=20), dict(filter_empty_gt=True)]),
)
def test_the_counts_are_those_of_mmdet(tmp_path, images, annotations, filter_cfg):
    images = [image(i, **sides) for i, sides in enumerate(images, 1)]
    annotations = [annotation(i, **entries) for i, entries in enumerate(annotations)]
    write(tmp_path, images, annotations, files=False)
    cfg = read(tmp_path, filter_cfg=filter_cfg, pipeline=[dict(type='LoadImageFromFile')], serialize_data=False)
    cfg.train_dataloader.dataset.data_prefix.img = 's3://images/'  # whose files are not looked for
    dataset = build(cfg)
    if not len(dataset):
        assert 'is left to train on' in refusal(cfg, 'train')
        return

    read_by_mmdet = [dataset.get_data_info(i)['instances'] for i in range(len(dataset))]
    objects = [[instance for instance in image if not instance['ignore_flag']] for image in read_by_mmdet]
    without = sum(not image for image in objects)
    start = (
        f'{KEY}: {len(dataset)} of {len(images)} images of {tmp_path}/annotations/instances_train.json are trained on'
    )
    start += f', {without} of them without an object' if without else ''
    (note,) = check_annotations(cfg, ['train'])
    assert note.startswith(start + ('. ' if len(dataset) == len(images) else '; left out: '))
    total = sum(map(len, objects))
    assert f'. {total} of {len(annotations)} objects are trained on' in note
    crowds = sum(instance['ignore_flag'] for image in read_by_mmdet for instance in image)
    if len(dataset) == len(images):
        assert crowds == int((re.search(r'(\d+) crowds', note) or [0, 0])[1])
    # Every reason has its number, and none is missing.
    for part, left_out in ((0, len(images) - len(dataset)), (1, len(annotations) - total)):
        reasons = note.removeprefix(f'{KEY}: ').split('. ')[part].partition('left out: ')[2]
        assert sum(int(number) for number in re.findall(r'(?:^|, )(\d+) ', reasons)) == left_out


def test_every_reason_is_named(tmp_path):
    images = [image(1), image(2, width=20), image(3), image(4), image(5)]
    annotations = [
        annotation(1),
        annotation(2, image_id=2),
        annotation(3, image_id=3, iscrowd=1, segmentation=dict(size=[SIDE, SIDE], counts=[0, 100, 3996])),
        annotation(4, bbox=[100, 10, 30, 30]),
        annotation(5, bbox=[-40, 10, 30, 30]),
        annotation(6, bbox=[10, 10, -5, 30]),
        annotation(7, bbox=[10, 10, 0.5, 30]),
        annotation(8, area=0),
        annotation(9, category_id=7),
        annotation(10, category_id=99),
        annotation(11, image_id=77),
        annotation(12, ignore=1),
        annotation(13, segmentation=[[1, 1, 9, 9]]),
        annotation(14, image_id=5, category_id=7),
    ]
    write(tmp_path, images, annotations)
    assert told(read(tmp_path)) == (
        f'{KEY}: 2 of 5 images of {tmp_path}/annotations/instances_train.json are trained on, 1 of them without an '
        'object; left out: 2 without an annotation of its classes (filter_cfg.filter_empty_gt), 1 with a side below 32 '
        'pixels (filter_cfg.min_size). 1 of 14 objects are trained on; left out: 3 outside of their image or of no '
        'area, 3 of other categories, 2 of no area or thinner than a pixel, 1 marked to be ignored, 1 without a valid '
        'mask (ignored regions), 1 in images left out, 1 crowds (ignored regions), 1 of images that are not listed.'
    )
    dataset = build(read(tmp_path))
    packed = [dataset[i]['data_samples'] for i in range(len(dataset))]
    assert [len(sample.gt_instances) for sample in packed] == [1, 0]
    assert [len(sample.ignored_instances) for sample in packed] == [1, 1]  # the one without a valid mask, the crowd


def test_nothing_left_out_is_said_in_numbers_alone(tmp_path):
    write(tmp_path, [image(1), image(2)], [annotation(1), annotation(2, image_id=2)])
    path = tmp_path / 'annotations/instances_train.json'
    assert told(read(tmp_path)) == (f'{KEY}: 2 of 2 images of {path} are trained on. 2 of 2 objects are trained on.')
    assert check_annotations(read(tmp_path), ['val']) == []


REFUSED = [
    ([image(1), image(1, file_name='2.png')], [annotation(1)], 'several images of one id (1)'),
    ([image(1)], [annotation(5), annotation(5)], 'several annotations of one id (5)'),
    ([image(1)], [annotation(1, segmentation=[])], "no segmentation for the annotations 1 of '1.png'"),
    ([image(1)], [annotation(1, segmentation=None)], 'no segmentation for the annotations 1'),
    ([image(1)], [annotation(3, segmentation=dict(size=[9, 9], counts=[81]))], 'a mask of [9, 9] pixels for'),
    ([image(1)], [annotation(1, bbox=[1, 2, 3])], 'a bbox that is not four numbers'),
    ([image(1)], [annotation(8, bbox=[1, 2, float('nan'), 3])], 'height in the annotations 8'),
    ([image(1)], [annotation(1, bbox='1 2 3 4')], 'a bbox that is not four numbers'),
    ([image(1)], [{'id': 1, 'image_id': 1}], "has no 'category_id', 'bbox', 'area' for its annotation number 1"),
    ([image(1), {'id': 2}], [annotation(1)], "has no 'file_name', 'width', 'height' for its image number 2"),
    ([image(1)], [], 'none of the 1 images'),
    ([image(1)], [annotation(1, category_id=7)], 'none of the 1 images'),
    ([], [], 'none of the 0 images'),
]  # fmt: skip


@pytest.mark.parametrize(('images', 'annotations', 'sentence'), REFUSED)
def test_refused_by_the_name_of_the_file(tmp_path, images, annotations, sentence):
    write(tmp_path, images, annotations, files=False)
    for entry in images:
        cv2.imwrite(str(tmp_path / 'train' / entry.get('file_name', 'x.png')), np.zeros((SIDE, SIDE, 3), np.uint8))
    message = refusal(read(tmp_path))
    assert message.startswith(KEY)
    assert sentence in message
    assert f'{tmp_path}/annotations/instances_train.json' in message


@pytest.mark.parametrize('text', ['', '{"images": [{"id": 1, "fi', 'no JSON', '[]', '{"annotations": []}', '\x80\x04'])
def test_a_file_that_is_no_annotations(tmp_path, text):
    write(tmp_path, [image(1)], [annotation(1)])
    path = tmp_path / 'annotations/instances_train.json'
    path.write_bytes(text.encode('latin1'))
    assert refusal(read(tmp_path)).startswith(f'{KEY}.ann_file: {path}')


@pytest.mark.parametrize('split', ['train', 'val'])
def test_image_files_that_are_missing_or_empty(tmp_path, split):
    write(tmp_path, [image(i) for i in range(1, 9)], [annotation(i, image_id=i) for i in range(1, 9)])
    (tmp_path / split / '3.png').write_bytes(b'')
    message = refusal(read(tmp_path))
    assert message.startswith(
        f'{split}_dataloader.dataset: 1 of the 8 images of {tmp_path}/annotations/instances_{split}'
    )
    assert f"empty files, '{tmp_path}/{split}/3.png':" in message
    for i in (2, 4, 5, 6, 7):
        (tmp_path / split / f'{i}.png').unlink()
    message = refusal(read(tmp_path))
    assert message.startswith(f'{split}_dataloader.dataset: 5 of the 8 images of ')
    files = ', '.join(f"'{tmp_path}/{split}/{i}.png'" for i in (2, 4, 5))
    assert f'are missing, {files}, …: fetch them' in message
    check_annotations(read(tmp_path), ['val' if split == 'train' else 'train'])


def test_a_missing_file_of_an_image_that_is_left_out_does_no_harm(tmp_path):
    write(tmp_path, [image(1), image(2)], [annotation(1)])
    (tmp_path / 'train/2.png').unlink()
    assert '1 of 2 images' in told(read(tmp_path))


def test_one_process_of_several_looks(tmp_path, monkeypatch):
    write(tmp_path, [], [])
    monkeypatch.setenv('RANK', '1')
    assert check_annotations(read(tmp_path), ['train']) == []
    monkeypatch.setenv('RANK', '0')
    assert 'none of the 0 images' in refusal(read(tmp_path))


def save(path, mode, size=(SIDE, SIDE), **arguments):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], len(mode)), np.uint8)
    Image.frombytes(mode, size, pixels.tobytes()).save(path, **arguments)


def save_sixteen_bits(path):
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 2**16, (SIDE, SIDE, 3), np.uint16))


def save_rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    save(path, 'RGB', (SIDE // 2, SIDE), exif=exif)


STRANGE = [
    ('1.jpg', lambda path: save(path, 'CMYK'), (SIDE, SIDE)),
    ('1.jpg', lambda path: save(path, 'L'), (SIDE, SIDE)),
    ('1.png', lambda path: save(path, 'L'), (SIDE, SIDE)),
    ('1.png', lambda path: save(path, 'LA'), (SIDE, SIDE)),
    ('1.png', lambda path: save(path, 'RGBA'), (SIDE, SIDE)),
    ('1.png', save_sixteen_bits, (SIDE, SIDE)),
    ('1.png', lambda path: save(path, 'RGB', (300, 1)), (300, 1)),
    ('1.png', lambda path: save(path, 'RGB', (1, 300)), (1, 300)),
    ('1.png', lambda path: save(path, 'RGB', (1, 1)), (1, 1)),
    ('1.jpg', save_rotated, (SIDE, SIDE // 2)),
]


@pytest.mark.parametrize(('name', 'make', 'size'), STRANGE)
def test_strange_images_are_read(tmp_path, name, make, size):
    """As three channels of bytes, and turned as their EXIF says; annotations are of the turned image."""
    width, height = size
    (tmp_path / 'train').mkdir()
    make(tmp_path / 'train' / name)
    box = dict(bbox=[0, 0, width, height], area=width * height, segmentation=[[0, 0, width, 0, width, height]])
    write(tmp_path, [image(1, file_name=name, width=width, height=height)], [annotation(1, **box)], files=False)
    cfg = read(tmp_path, filter_cfg=None)
    assert '1 of 1 images' in check_annotations(cfg, ['train'])[0]
    if 1 in size:  # mmdet cannot pack a row of pixels that is turned round
        (flip,) = (step for step in cfg.train_dataloader.dataset.pipeline if step.type == 'RandomFlip')
        flip.prob = 0.0
    packed = build(cfg)[0]
    scale = 192 / max(size)
    expected = (3, max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1))
    assert packed['inputs'].shape in (expected, (3, expected[2], expected[1]))  # flipped diagonally
    assert str(packed['inputs'].dtype) == 'torch.uint8'
    assert len(packed['data_samples'].gt_instances) == 1


@pytest.mark.parametrize('content', ['none', 'text', 'half'])
@pytest.mark.parametrize('name', ['1.png', '1.jpg'])
def test_a_file_that_is_no_image_is_named(tmp_path, name, content):
    """Before the training if it is empty, else when it is read: nothing is trained on in its place."""
    write(tmp_path, [image(1, file_name=name)], [annotation(1)])
    path = tmp_path / 'train' / name
    save(path, 'RGB')
    whole = path.read_bytes()
    path.write_bytes(dict(none=b'', text=b'no image', half=whole[: len(whole) // 2])[content])
    if content == 'none':
        assert f"'{tmp_path}/train/{name}'" in refusal(read(tmp_path))
        return
    dataset = build(read(tmp_path))
    with pytest.raises(AssertionError, match=f'failed to load image: {tmp_path}/train/{name}'):
        dataset[0]


@pytest.fixture
def folders(tmp_path):
    """Images of two classes for the classifier's config."""
    for split in ('train', 'val'):
        for name in ('cat', 'dog'):
            (tmp_path / split / name / 'deeper').mkdir(parents=True)
            for file in ('1.png', '2.JPG', 'deeper/3.png'):
                save(tmp_path / split / name / file, 'RGB')
    return tmp_path


def read_folders(root):
    return replace_data_root(DIGITS, str(root))


def test_files_in_folders_of_classes_that_are_left_out(folders):
    start = f'{KEY}: 12 images of {folders}/train are trained on'
    for name in ('cat', 'dog'):
        for i in range(3):
            save(folders / 'train' / name / f'more{i}.bmp', 'RGB')
    assert told(read_folders(folders)) == f'{start}.'
    (folders / 'train/cat/4.webp').touch()
    (folders / 'train/dog/notes').touch()
    (folders / 'train/beside.png').touch()  # which belongs to no class
    note = told(read_folders(folders))
    assert note.startswith(f'{start}; left out: 2 files that do not end in .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif (')
    assert f"'{folders}/train/cat/4.webp', '{folders}/train/dog/notes'" in note
    init_default_scope('mmpretrain')
    assert len(DATASETS.build(read_folders(folders).train_dataloader.dataset)) == 12


def test_empty_files_in_folders_of_classes(folders):
    (folders / 'val/cat/1.png').write_bytes(b'')
    message = refusal(read_folders(folders))
    assert message.startswith(f'val_dataloader.dataset: 1 of the 6 images of {folders}/val are empty files, ')
    assert f"'{folders}/val/cat/1.png'" in message


@pytest.mark.slow
class TestCommandLine:
    def train(self, root, cwd):
        options = ['train_cfg.max_iters=1', 'train_cfg.val_interval=10', 'train_dataloader.batch_size=2']
        return run(
            *(ROOT / 'tools/train.py', CONFIG, '--data-root', root, '--work-dir', 'work', '--cfg-options', *options),
            cwd=cwd,
        )

    def test_what_is_left_out_is_in_the_log(self, tmp_path):
        """Images without an object, but with a crowd or one of no area, are trained on."""
        crowd = dict(iscrowd=1, segmentation=dict(size=[SIDE, SIDE], counts=[0, 100, 3996]))
        annotations = [annotation(1, **crowd), annotation(2, image_id=2, area=0), annotation(3, image_id=77)]
        write(tmp_path, [image(1), image(2), image(3)], annotations)
        result = self.train(tmp_path, tmp_path)
        assert result.returncode == 0, result.stderr
        note = (
            '2 of 3 images of .*, 2 of them without an object; left out: 1 without an annotation of .* 0 of 3 objects'
        )
        (log,) = (tmp_path / 'work').glob('*/*.log')
        assert re.search(note, log.read_text())
        (work,) = (tmp_path / 'work').glob('*/vis_data/scalars.json')
        assert np.isfinite(json.loads(work.read_text().splitlines()[0])['loss'])

    def test_missing_images_end_it(self, tmp_path):
        write(tmp_path, [image(1)], [annotation(1)])
        (tmp_path / 'val/1.png').unlink()
        sentence = the_sentence(self.train(tmp_path, tmp_path))
        assert sentence.startswith(f'ConfigError: val_dataloader.dataset: 1 of the 1 images of {tmp_path}/annotations')
        assert f'{tmp_path}/val/1.png' in sentence
