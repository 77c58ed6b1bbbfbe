"""A config is refused for what would go wrong later, by a sentence that names the key, and for nothing else."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from command_line import ROOT, run, the_sentence
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.logging import MMLogger

from mmevm.cli import read_config, replace_data_root
from mmevm.preflight import ConfigError, check_config
from mmevm.preflight.arguments import check_arguments
from mmevm.preflight.model import check_model

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


def test_unknown_classes_are_not_checked(cfg):
    dataset = cfg.train_dataloader.dataset
    dataset.type = 'BaseDetDataset'
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


DEMOS = {
    'detector': Config.fromfile(CONFIGS / 'demo/maskrcnn_evm_m1_shapes.py'),
    'classifier': Config.fromfile(CONFIGS / 'demo/evm_m1_digits.py'),
}
EFFICIENTVIM = 'EfficientViM cannot be built: '
NECK = 'model.neck.in_channels'

# What is changed in a demo's config, and how the sentence begins.
MISTAKES = [
    ('model.backbone.ach', 'm4', "model.backbone.ach: EfficientViM has no argument 'ach' (did you mean 'arch'?)"),
    (
        'model.backbone.out_indicies',
        (0, 1),
        "model.backbone.out_indicies: EfficientViM has no argument 'out_indicies' (did you mean 'out_indices'?); it "
        'takes arch, deploy, drop_path_rate, frozen_stages, in_channels, ',
    ),
    ('model.backbone.arch', 'm5', f"model.backbone: {EFFICIENTVIM}arch='m5' is unknown: choose from ['m1', 'm2', "),
    ('model.backbone.arch', ('m1',), f"model.backbone: {EFFICIENTVIM}arch=('m1',) is unknown: choose from ['m1', "),
    ('model.backbone.out_indices', (0, 3), f'model.backbone: {EFFICIENTVIM}out_indices=(0, 3): give one or more of [0'),
    ('model.backbone.out_indices', (1, 0), f'model.backbone: {EFFICIENTVIM}out_indices=(1, 0): give one or more of [0'),
    ('model.backbone.out_indices', 2, f'model.backbone: {EFFICIENTVIM}out_indices=2: give a tuple or list, such as'),
    ('model.backbone.frozen_stages', 9, f'model.backbone: {EFFICIENTVIM}frozen_stages=9: −1 (nothing), 0 (the stem)'),
    ('model.backbone.drop_path_rate', 2, f'model.backbone: {EFFICIENTVIM}drop_path_rate=2: a probability from 0 to'),
    (
        'model.backbone.type',
        'mmevm.EfficentViM',
        "model.backbone.type='mmevm.EfficentViM' is not registered (did you mean 'mmevm.EfficientViM'?)",
    ),
    (
        'model.backbone.type',
        'EfficientViM',
        "model.backbone.type='EfficientViM' is not registered (did you mean 'mmevm.EfficientViM'?)",
    ),
    ('model.backbone', (dict(type='mmevm.EfficientViM'),), 'model.backbone is a tuple of one: take away the comma'),
    ('model.backbone.norm_cfg', dict(type='BNN'), "model.backbone.norm_cfg.type='BNN' is not registered (did you"),
    (
        'model.backbone.mixer_cfg',
        dict(type='mmevm.HSMSDD'),
        "model.backbone.mixer_cfg.type='mmevm.HSMSDD' is not registered (did you mean 'mmevm.HSMSSD'?)",
    ),
    (
        'model.backbone.mixer_cfg',
        dict(type='mmevm.HSMSSD', expand=2),
        "model.backbone.mixer_cfg.expand: HSMSSD has no argument 'expand' (did you mean 'ssd_expand'?)",
    ),
    ('model.backbone.arch', 'm4', f'{NECK}=[128, 192, 320], but model.backbone gives 3 maps of 224, 320, 512'),
    ('model.backbone.out_indices', (0, 1), f'{NECK}=[128, 192, 320], but model.backbone gives 2 maps of 128, 192 chan'),
    (
        NECK,
        [224, 320, 512],
        f'{NECK}=[224, 320, 512], but model.backbone gives 3 maps of 128, 192, 320 channels: set {NECK}=[128, 192,',
    ),
    (
        'model.neck',
        dict(type='FPN', in_channels=[256, 512, 1024], out_channels=64, num_outs=5),
        f'{NECK}=[256, 512, 1024], but model.backbone gives 3 maps of 128, 192, 320 channels: ',
    ),
    ('model.neck', None, 'model.rpn_head.in_channels=64, but model.backbone gives 3 maps of 128, 192, 320 channels:'),
    ('model.neck.in_channel', 64, "model.neck.in_channel: UpsampleFPN has no argument 'in_channel' (did you mean 'in_"),
    ('model.neck.num_outs', 4, 'model.neck: UpsampleFPN cannot be built: num_outs=4 levels cannot hold'),
    ('model.neck.num_outs', 6, 'model.rpn_head: its anchors or points are for 5 maps, of strides 4, 8, 16, 32, 64,'),
    ('model.neck.add_extra_convs', 'on_inputs', 'model.neck: UpsampleFPN cannot be built: AssertionError: assert'),
    ('model.rpn_head.anchor_generator.strides', [4, 8], 'model.rpn_head: its anchors or points are for 2 maps, of'),
    (
        'model.neck.out_channels',
        128,
        'model.rpn_head.in_channels=64, but model.neck gives 5 maps of 128 channels: set',
    ),
    ('model.rpn_head.in_channels', 256, 'model.rpn_head.in_channels=256, but model.neck gives 5 maps of 64 channels: '),
    (
        'model.rpn_head.loss_cls.use_sigmoids',
        True,
        "model.rpn_head.loss_cls.use_sigmoids: CrossEntropyLoss has no argument 'use_sigmoids' (did you mean",
    ),
    (
        'model.rpn_head.loss_cls.type',
        'CrossEntropy',
        "model.rpn_head.loss_cls.type='CrossEntropy' is not registered (did you mean 'CrossEntropyLoss'?)",
    ),
    (
        'model.roi_head.bbox_roi_extractor.out_channels',
        256,
        'model.roi_head.bbox_roi_extractor.out_channels=256, but model.neck gives maps of 64 channels: set',
    ),
    (
        'model.roi_head.mask_roi_extractor.featmap_strides',
        [4, 8, 16, 32, 64, 128],
        'model.roi_head.mask_roi_extractor.featmap_strides=[4, 8, 16, 32, 64, 128] are of 6 maps, but model.neck',
    ),
    (
        'model.roi_head.bbox_head.in_channels',
        256,
        'model.roi_head.bbox_head.in_channels=256, but model.roi_head.bbox_roi_extractor.out_channels=64: set',
    ),
    (
        'model.roi_head.mask_head.in_channels',
        256,
        'model.roi_head.mask_head.in_channels=256, but model.roi_head.mask_roi_extractor.out_channels=64: set',
    ),
    (
        'model.roi_head.bbox_head.num_clases',
        1,
        "model.roi_head.bbox_head.num_clases: Shared2FCBBoxHead has no argument 'num_clases' (did you mean",
    ),
    (
        'model.train_cfg.rcnn.assigner.pos_iou_th',
        0.5,
        "model.train_cfg.rcnn.assigner.pos_iou_th: MaxIoUAssigner has no argument 'pos_iou_th' (did you mean",
    ),
    ('model.data_preprocessor.means', [1], "model.data_preprocessor.means: DetDataPreprocessor has no argument"),
    ('model.typ', 'MaskRCNN', "model.typ: MaskRCNN has no argument 'typ'"),
    ('optim_wrapper.optimizer.learning_rate', 1, "optim_wrapper.optimizer.learning_rate: AdamW has no argument 'learn"),
    ('optim_wrapper.optimizer.type', 'AdmW', "optim_wrapper.optimizer.type='AdmW' is not registered (did you mean 'Ad"),
    ('optim_wrapper.clip_gradient', {}, "optim_wrapper.clip_gradient: OptimWrapper has no argument 'clip_gradient'"),
    ('optim_wrapper.type', 'OptimWraper', "optim_wrapper.type='OptimWraper' is not registered (did you mean"),
    ('param_scheduler.0.start_facter', 1, "param_scheduler.0.start_facter: LinearLR has no argument 'start_facter'"),
    ('param_scheduler.1.type', 'CosineLR', "param_scheduler.1.type='CosineLR' is not registered (did you mean"),
    ('train_cfg.max_iter', 3, "train_cfg.max_iter: IterBasedTrainLoop has no argument 'max_iter' (did you mean"),
    ('train_cfg.type', 'IterBasedLoop', "train_cfg.type='IterBasedLoop' is not registered (did you mean"),
    ('train_dataloader.batchsize', 1, "train_dataloader.batchsize: DataLoader has no argument 'batchsize' (did you"),
    ('train_dataloader.sampler.type', 'Infinite', "train_dataloader.sampler.type='Infinite' is not registered (did"),
    (f'{DATASET}.type', 'COCODataset', f"{DATASET}.type='COCODataset' is not registered (did you mean 'CocoDataset'?)"),
    (f'{DATASET}.anno_file', 'x', f"{DATASET}.anno_file: CocoDataset has no argument 'anno_file' (did you mean"),
    (f'{DATASET}.pipeline.2.type', 'Rezise', f"{DATASET}.pipeline.2.type='Rezise' is not registered (did you mean"),
    (f'{DATASET}.pipeline.2.scales', 3, f"{DATASET}.pipeline.2.scales: Resize has no argument 'scales' (did you mean"),
    ('val_evaluator.metrics', 'bbox', "val_evaluator.metrics: CocoMetric has no argument 'metrics' (did you mean"),
    ('custom_hooks', [dict(type='EMAHok')], "custom_hooks.0.type='EMAHok' is not registered (did you mean 'EMAHook'?)"),
    ('default_hooks.timer.intervals', 1, "default_hooks.timer.intervals: IterTimerHook has no argument 'intervals'"),
    ('visualizer.vis_backends.0.type', 'LocalBackend', "visualizer.vis_backends.0.type='LocalBackend' is not"),
]  # fmt: skip
MISTAKES_OF_CLASSIFIERS = [
    (
        'model.head.in_channels',
        [1, 2],
        'model.head.in_channels=[1, 2], but model.backbone gives 4 maps of 128, 192, 320, 320 channels: set',
    ),
    ('model.backbone.out_hidden_states', False, 'model.head.in_channels=[128, 192, 320, 320], but model.backbone'),
    (
        'model.head',
        dict(type='LinearClsHead', num_classes=10, in_channels=512),
        'model.head.in_channels=512, but model.backbone gives 4 maps of 128, 192, 320, 320 channels: set',
    ),
    (
        'model.train_cfg.augments',
        [dict(type='MixUp')],
        "model.train_cfg.augments.0.type='MixUp' is not registered (did you mean 'Mixup'?)",
    ),
    ('data_preprocessor.to_one_hot', True, "data_preprocessor.to_one_hot: ClsDataPreprocessor has no argument"),
    ('custom_hooks.1.begins', 1, "custom_hooks.1.begins: MESAHook has no argument 'begins' (did you mean 'begin'?)"),
]  # fmt: skip


def check_modules(cfg):
    check_arguments(cfg, ['train', 'val', 'test'])
    check_model(cfg)


def changed(demo, key, value):
    cfg = Config(DEMOS[demo].to_dict())
    *path, last = key.split('.')
    part = cfg
    for name in path:
        part = part[int(name)] if name.isdigit() else part[name]
    part[last] = value
    return cfg


@pytest.mark.parametrize(
    ('demo', 'key', 'value', 'sentence'),
    [('detector', *case) for case in MISTAKES] + [('classifier', *case) for case in MISTAKES_OF_CLASSIFIERS],
)
def test_mistakes_that_a_person_makes(demo, key, value, sentence):
    cfg = changed(demo, key, value)
    before = cfg.to_dict()
    with pytest.raises(ConfigError) as error:
        check_modules(cfg)
    assert str(error.value).startswith(sentence)
    assert '\n' not in str(error.value)
    assert cfg.to_dict() == before


@pytest.mark.slow
def test_mistakes_end_the_command_line_before_anything_is_built(tmp_path):
    for split in ('train', 'val'):
        (tmp_path / f'data/{split}').mkdir(parents=True)
        write_annotations(tmp_path / f'data/annotations/instances_{split}.json', ['shape'])
    arguments = [CONFIGS / 'demo/maskrcnn_evm_m1_shapes.py', '--data-root', 'data', '--work-dir', 'work']
    options = ['--cfg-options', 'model.backbone.out_indices=(0,3)']
    sentence = the_sentence(run(ROOT / 'tools/train.py', *arguments, *options, cwd=tmp_path))
    assert sentence.startswith('ConfigError: model.backbone: EfficientViM cannot be built: out_indices=')
    assert not (tmp_path / 'work').exists()


def test_strides_that_are_hardly_meant_are_a_warning(caplog):
    cfg = changed('detector', 'model.neck.num_upsamples', 1)
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        check_model(cfg)
        check_model(DEMOS['detector'])
    finally:
        logger.removeHandler(caplog.handler)
    (message,) = {record.getMessage() for record in caplog.records if 'strides' in record.getMessage()}
    assert message.startswith(
        'model.rpn_head: its anchors or points are for maps of strides 4, 8, 16, 32, 64, but model.neck gives maps of '
        'strides 8, 16, 32, 64, 128'
    )


def test_the_trial_leaves_no_trace():
    """Neither in the stream of random numbers, nor in modules that are built later."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    check_model(DEMOS['detector'])
    assert torch.rand(3).equal(expected)
    with pytest.raises(ConfigError):
        check_model(changed('detector', 'model.neck.num_outs', 1))
    assert torch.nn.Linear(1, 1).weight.device.type == 'cpu'


@pytest.mark.parametrize(
    'name',
    [
        *(
            'retinanet/retinanet_r50_fpn_1x_coco',
            'faster_rcnn/faster-rcnn_r50_fpn_1x_coco',
            'atss/atss_r50_fpn_1x_coco',
        ),
        *('mask_rcnn/mask-rcnn_r50_fpn_1x_coco', 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco'),
        *('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco', 'rtmdet/rtmdet_tiny_8xb32-300e_coco', 'gfl/gfl_r50_fpn_1x_coco'),
        *('deformable_detr/deformable-detr_r50_16xb2-50e_coco', 'yolox/yolox_s_8xb8-300e_coco', 'ssd/ssd300_coco'),
        *('tood/tood_r50_fpn_1x_coco', 'libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco', 'htc/htc_r50_fpn_1x_coco'),
        *(
            'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco',
            'dyhead/atss_r50_fpn_dyhead_1x_coco',
            'detr/detr_r50_8xb2-150e_coco',
        ),
    ],
)
def test_stock_configs_are_accepted(name):
    check_modules(read_config(f'mmdet::{name}.py'))


@pytest.mark.parametrize('path', sorted(CONFIGS.rglob('*evm_*.py')), ids=lambda path: path.stem)
def test_own_configs_are_accepted(path):
    if '_base_' in path.parts:
        return
    check_modules(Config.fromfile(path))
