"""A config is refused for what would go wrong later, by a sentence that names the key, and for nothing else."""

import itertools
import json
from pathlib import Path

import pytest
from mmdet.datasets import CocoDataset
from mmengine.config import Config

from mmevm.cli import replace_data_root
from mmevm.preflight import ConfigError, check_config

CONFIGS = Path(__file__).parents[1] / 'configs'
DATASET = 'train_dataloader.dataset'


def write_annotations(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    categories = [dict(id=i, name=name) for i, name in enumerate(names)]
    path.write_text(json.dumps(dict(images=[], annotations=[], categories=categories)))


@pytest.fixture
def root(tmp_path):
    """Data of cats and dogs."""
    (tmp_path / 'images').mkdir()
    for split in ('train', 'val'):
        write_annotations(tmp_path / f'{split}.json', ['bird', 'cat', 'dog'])
    return tmp_path


@pytest.fixture
def cfg(root):
    """A config of two classes with which nothing is wrong."""

    def loader(split):
        return dict(
            dataset=dict(
                type='CocoDataset',
                data_root=f'{root}/',
                ann_file=f'{split}.json',
                data_prefix=dict(img='images/'),
                metainfo=dict(classes=('cat', 'dog')),
            )
        )

    cfg = Config(
        dict(
            default_scope='mmdet',
            model=dict(
                rpn_head=dict(num_classes=1),
                roi_head=dict(bbox_head=dict(num_classes=2), mask_head=dict(num_classes=2)),
            ),
            train_dataloader=loader('train'),
            val_dataloader=loader('val'),
            val_evaluator=dict(type='CocoMetric', ann_file=f'{root}/val.json'),
        )
    )
    check_config(cfg, ['train', 'val', 'test'])  # there is no test, and that is no mistake
    return cfg


def refusal(cfg, *splits):
    with pytest.raises(ConfigError) as error:
        check_config(cfg, splits or ['train', 'val'])
    return str(error.value)


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize(
    ('key', 'path'), [('ann_file', 'none.json'), ('data_prefix.img', 'none/'), ('data_root', '/nowhere/')]
)
def test_missing_data(cfg, root, split, key, path):
    cfg.merge_from_dict({f'{split}_dataloader.dataset.{key}': path})
    message = refusal(cfg)
    named = (
        'data_prefix.img: there is no /nowhere/images/' if key == 'data_root' else f'{key}: there is no {root}/{path}'
    )
    assert message.startswith(f'{split}_dataloader.dataset.{named}')
    assert '--data-root DIR' in message
    check_config(cfg, ['val' if split == 'train' else 'train'])  # which was not touched


def test_paths_of_their_own_are_not_joined_to_the_root(cfg, root):
    dataset = cfg.train_dataloader.dataset
    dataset.update(data_root='/nowhere', ann_file=f'{root}/train.json', data_prefix=dict(img=f'{root}/images'))
    check_config(cfg, ['train'])
    dataset.pop('data_root')
    check_config(cfg, ['train'])


@pytest.mark.parametrize('as_list', [False, True])
def test_missing_annotations_of_the_evaluator(cfg, as_list):
    cfg.val_evaluator.ann_file = '/nowhere/val.json'
    if as_list:
        cfg.val_evaluator = [dict(type='DumpDetResults'), cfg.val_evaluator]
    message = refusal(cfg, 'val')
    assert message.startswith('val_evaluator.ann_file: there is no /nowhere/val.json')
    assert '--data-root DIR' in message


def test_an_empty_annotation_file(cfg, root):
    (root / 'train.json').write_text('')
    assert f'{DATASET}.ann_file: {root}/train.json is empty' in refusal(cfg)


def test_classes_that_are_not_annotated(cfg):
    cfg.train_dataloader.dataset.metainfo.classes = ('cat', 'Dog')
    message = refusal(cfg)
    assert message.startswith(f"{DATASET}: 1 of its 2 classes, 'Dog', are not among the categories")
    assert "'bird', 'cat', 'dog'" in message
    assert f'{DATASET}.metainfo.classes' in message


def test_classes_of_the_dataset_itself(cfg):
    """Where a config names no classes, they are those of COCO."""
    cfg.train_dataloader.dataset.pop('metainfo')
    assert f'{DATASET}: 77 of its 80 classes' in refusal(cfg)
    cfg.train_dataloader.dataset.type = CocoDataset  # as a config in pure Python has it
    assert f'{DATASET}: 77 of its 80 classes' in refusal(cfg)


def test_classes_in_a_file(cfg, root):
    (root / 'classes.txt').write_text('cat\ndog\n')
    cfg.train_dataloader.dataset.metainfo.classes = f'{root}/classes.txt'
    check_config(cfg, ['train'])
    (root / 'classes.txt').write_text('cat\nwolf\n')
    assert "'wolf'" in refusal(cfg)


def test_the_only_class_without_a_comma(cfg):
    cfg.train_dataloader.dataset.metainfo.classes = 'cat'
    assert 'num_classes=1' in refusal(cfg)
    cfg.merge_from_dict({f'model.roi_head.{head}_head.num_classes': 1 for head in ('bbox', 'mask')})
    check_config(cfg, ['train'])


HEADS = [
    (dict(bbox_head=dict(num_classes=80)), 'model.bbox_head'),
    (dict(roi_head=dict(bbox_head=dict(num_classes=2), mask_head=dict(num_classes=80))), 'model.roi_head.mask_head'),
    (dict(roi_head=dict(bbox_head=[dict(num_classes=n) for n in (2, 2, 80)])), 'model.roi_head.bbox_head.2'),
    (dict(detector=dict(roi_head=dict(bbox_head=dict(num_classes=80)))), 'model.detector.roi_head.bbox_head'),
    (dict(head=dict(num_classes=80)), 'model.head'),
]


@pytest.mark.parametrize(('model', 'key'), HEADS)
def test_heads_of_another_number_of_classes(cfg, model, key):
    cfg.model = model
    message = refusal(cfg)
    assert message.startswith(
        f"{key}.num_classes=80, but {DATASET} has 2 classes ('cat', 'dog'): set {key}.num_classes=2"
    )


def test_many_names_are_cut_short(cfg):
    cfg.train_dataloader.dataset.metainfo.classes = [f'class {i}' for i in range(100)]
    message = refusal(cfg)
    assert "100 of its 100 classes, 'class 0', " in message
    assert "'class 5', …" in message
    assert 'class 6' not in message


WRAPPERS = [
    (lambda good, bad: dict(type='RepeatDataset', times=3, dataset=bad), 'dataset'),
    (lambda good, bad: dict(type='ConcatDataset', datasets=[good, bad]), 'datasets.1'),
    (
        lambda good, bad: dict(type='MultiImageMixDataset', dataset=dict(type='ConcatDataset', datasets=[bad, good])),
        'dataset.datasets.0',
    ),
]


@pytest.mark.parametrize(('wrap', 'key'), WRAPPERS)
def test_datasets_in_wrappers(cfg, wrap, key):
    good = cfg.train_dataloader.dataset.to_dict()
    cfg.train_dataloader.dataset = wrap(good, good)
    check_config(cfg, ['train'])
    for change, expected in [
        (dict(ann_file='none.json'), '.ann_file: there is no'),
        (dict(metainfo=dict(classes=('cat', 'wolf'))), ": 1 of its 2 classes, 'wolf'"),
    ]:
        cfg.train_dataloader.dataset = wrap(good, good | change)
        assert refusal(cfg).startswith(f'{DATASET}.{key}{expected}')


REMOTE = [
    dict(data_root='s3://bucket/coco/'),
    dict(ann_file='https://example.org/train.json', data_prefix=dict(img='s3://bucket/images/')),
    dict(data_root='data/coco/', backend_args=dict(backend='petrel', path_mapping={'data/': 's3://bucket/'})),
]


@pytest.mark.parametrize('change', REMOTE)
def test_remote_files_are_left_alone(cfg, change):
    cfg.train_dataloader.dataset.update(change)
    check_config(cfg, ['train'])
    cfg.model.roi_head.bbox_head.num_classes = 80  # what can be told without the files, is
    assert 'model.roi_head.bbox_head.num_classes=80' in refusal(cfg)


@pytest.mark.parametrize(
    'change', [dict(ann_file='s3://val.json'), dict(ann_file='data/val.json', backend_args=dict(backend='petrel'))]
)
def test_remote_annotations_of_the_evaluator_are_left_alone(cfg, change):
    cfg.val_evaluator.update(change)
    check_config(cfg, ['val'])


def test_a_local_backend_is_checked(cfg):
    cfg.train_dataloader.dataset.update(data_root='/nowhere', backend_args=dict(backend='local'))
    assert 'there is no /nowhere/' in refusal(cfg)


@pytest.mark.parametrize('kind', ['BaseDetDataset', 'NotRegisteredAnywhere'])
def test_unknown_classes_are_not_checked(cfg, kind):
    dataset = cfg.train_dataloader.dataset
    dataset.type = kind
    dataset.pop('metainfo')
    cfg.model.roi_head.bbox_head.num_classes = 80
    check_config(cfg, ['train'])


def test_annotations_without_categories_are_not_checked(cfg, root):
    (root / 'train.json').write_text('{"metainfo": {}, "data_list": []}')
    check_config(cfg, ['train'])


ANIMALS = [
    dict(id=1, name='cat', keypoints=['nose', 'tail'], skeleton=[[1, 2]]),
    dict(id=2, name='dog ] "} [', supercategory='animal'),
    *(dict(id=3 + i, name=f'breed {i}', synonyms=['x' * 80, 'y']) for i in range(1000)),  # 120 kB of them, as LVIS has
]
# Where a tool that parsed all of it would fail, and take minutes on COCO.
REST = '"annotations": [' + '{"bbox": [1, 2], "segmentation": [[1, 2], [3]]}, ' * 20000 + ' not JSON]'


@pytest.mark.parametrize(
    'text',
    [
        '{%(rest)s, "categories": %(categories)s}',
        '{"categories":%(categories)s, %(rest)s}',
        '{%(rest)s,\n "categories" :\n  %(categories)s,\n "licenses": [{"id": 1}]}',
    ],
)
def test_categories_are_found_wherever_they_are(cfg, root, text):
    (root / 'train.json').write_text(text % dict(rest=REST, categories=json.dumps(ANIMALS)))
    dataset = cfg.train_dataloader.dataset
    dataset.metainfo.classes = ('breed 999', 'dog ] "} [')
    check_config(cfg, ['train'])
    dataset.metainfo.classes = ('cat', 'breed 1000')
    assert "1 of its 2 classes, 'breed 1000'" in refusal(cfg)


class TestFoldersOfClasses:
    @pytest.fixture
    def cfg(self, tmp_path):
        """A classifier of two classes with which nothing is wrong."""
        for split, name in itertools.product(('train', 'val'), ('cat', 'dog')):
            (tmp_path / split / name / 'deeper').mkdir(parents=True)
            (tmp_path / split / name / 'deeper/0.png').touch()

        def loader(split):
            return dict(dataset=dict(type='CustomDataset', data_root=f'{tmp_path}/', data_prefix=split))

        cfg = Config(
            dict(
                default_scope='mmpretrain',
                model=dict(head=dict(num_classes=2)),
                data_preprocessor=dict(num_classes=2),
                train_dataloader=loader('train'),
                val_dataloader=loader('val'),
            )
        )
        check_config(cfg, ['train', 'val', 'test'])
        return cfg

    @pytest.mark.parametrize('key', ['model.head', 'data_preprocessor'])
    def test_another_number_of_classes(self, cfg, key):
        cfg.merge_from_dict({f'{key}.num_classes': 3})
        message = f"{key}.num_classes=3, but {DATASET} has 2 classes ('cat', 'dog'): set {key}.num_classes=2 or"
        assert refusal(cfg, 'train').startswith(message)

    def test_an_empty_folder_is_refused_for_training_only(self, cfg, tmp_path):
        for split in ('train', 'val'):
            (tmp_path / split / 'dog/deeper/0.png').unlink()
        check_config(cfg, ['val'])
        (tmp_path / 'train/dog/deeper/0.webp').touch()
        assert '1 of the 2 folders of classes in' in refusal(cfg, 'train')
        assert "have no image, 'dog'" in refusal(cfg, 'train')
        cfg.train_dataloader.dataset.extensions = ['.webp', '.png']
        check_config(cfg, ['train'])

    def test_linked_folders_are_followed(self, cfg, tmp_path):
        (tmp_path / 'train/dog').rename(tmp_path / 'elsewhere')
        (tmp_path / 'train/dog').mkdir()
        (tmp_path / 'train/dog/link').symlink_to(tmp_path / 'elsewhere')
        check_config(cfg, ['train'])

    def test_names_in_another_order_than_the_folders(self, cfg):
        cfg.train_dataloader.dataset.metainfo = dict(classes=['dog', 'cat'])
        assert "the sorted folders ('cat', 'dog'), but metainfo.classes has another order" in refusal(cfg, 'train')
        cfg.train_dataloader.dataset.metainfo = dict(classes=['Katze', 'Hund'])  # translations, in order
        check_config(cfg, ['train'])

    def test_a_split_that_the_type_does_not_have(self, cfg):
        cfg.train_dataloader.dataset.split = 'train'
        assert "a CustomDataset has no split='train'" in refusal(cfg, 'train')

    @pytest.mark.parametrize('topk', [(1, 5), 5])
    def test_more_choices_than_classes(self, cfg, topk):
        cfg.val_evaluator = dict(type='Accuracy', topk=topk)
        assert refusal(cfg, 'val').startswith(f'val_evaluator.topk={topk}, but model.head.num_classes=2')
        cfg.val_evaluator.topk = (1, 2)
        check_config(cfg, ['val'])

    def test_folders_that_would_number_the_classes_differently(self, cfg, tmp_path):
        (tmp_path / 'val/bird').mkdir()
        cfg.merge_from_dict({'model.head.num_classes': 3, 'data_preprocessor.num_classes': 3})
        check_config(cfg, ['val'])
        (tmp_path / 'train/zebra').mkdir()
        (tmp_path / 'train/zebra/0.png').touch()
        assert "different folders of classes ('bird', 'zebra' are in one of them only)" in refusal(cfg, 'train', 'val')

    def test_names_that_are_not_as_many_as_the_folders(self, cfg):
        cfg.train_dataloader.dataset.metainfo = dict(classes=['a', 'b', 'c'])
        assert f"{DATASET} has 3 classes ('a', 'b', 'c'), but 2 folders of them ('cat', 'dog')" in refusal(cfg, 'train')

    def test_imagenet_in_folders_and_by_lists(self, cfg, tmp_path):
        cfg.train_dataloader.dataset = dict(type='ImageNet', data_root=str(tmp_path), split='train')
        assert "has 1000 classes ('tench" in refusal(cfg, 'train')
        (tmp_path / 'meta').mkdir()
        (tmp_path / 'meta/train.txt').touch()
        assert refusal(cfg, 'train').startswith(f'model.head.num_classes=2, but {DATASET} has 1000 classes')
        cfg.train_dataloader.dataset.split = 'test'  # has no labels
        assert refusal(cfg, 'train').startswith(f'model.head.num_classes=2, but {DATASET} has 1000 classes')

    def test_no_folder_at_all(self, cfg, tmp_path):
        cfg.val_dataloader.dataset.data_prefix = 'train/cat/deeper'
        assert refusal(cfg, 'val').endswith('train/cat/deeper has no folders, but needs one for each class.')
        cfg.val_dataloader.dataset.data_prefix = 'nowhere'
        message = f'val_dataloader.dataset.data_prefix: there is no {tmp_path}/nowhere'
        assert refusal(cfg, 'val').startswith(message)
        cfg.val_dataloader.dataset = dict(type='ImageNet', data_root='/nowhere', split='val')
        assert refusal(cfg, 'val').startswith('val_dataloader.dataset: there is no folder /nowhere/val')

    def test_a_list_of_files_or_a_remote_folder_is_left_to_mmpretrain(self, cfg, tmp_path):
        (tmp_path / 'train.txt').write_text('cat/deeper/0.png 0')
        cfg.train_dataloader.dataset.update(ann_file='train.txt')
        cfg.model.head.num_classes = 7
        check_config(cfg, ['train'])
        cfg.train_dataloader.dataset = dict(type='CustomDataset', data_root='s3://bucket', data_prefix='train')
        check_config(cfg, ['train'])


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*_evm_*.py')), ids=lambda path: path.stem)
def test_coco_configs_are_accepted_on_coco(path, tmp_path):
    for split in ('train', 'val'):
        (tmp_path / f'{split}2017').mkdir()
        write_annotations(tmp_path / f'annotations/instances_{split}2017.json', CocoDataset.METAINFO['classes'])
    cfg = Config.fromfile(path)
    check_config(replace_data_root(cfg, str(tmp_path)), ['train', 'val', 'test'])
    message = refusal(replace_data_root(cfg, '/nowhere'))
    assert message.startswith(f'{DATASET}.data_prefix.img: there is no /nowhere/train2017/')


def test_demo_config_is_accepted_on_its_data(tmp_path):
    for split in ('train', 'val'):
        (tmp_path / split).mkdir()
        write_annotations(tmp_path / f'annotations/instances_{split}.json', ['shape'])
    cfg = replace_data_root(Config.fromfile(CONFIGS / 'demo/maskrcnn_evm_m1_shapes.py'), str(tmp_path))
    check_config(cfg, ['train', 'val', 'test'])
    cfg.model.roi_head.mask_head.num_classes = 80
    assert 'model.roi_head.mask_head.num_classes=80' in refusal(cfg)
