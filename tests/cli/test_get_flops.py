"""tools/get_flops.py, in a process of its own or, faster, in this one."""

import pytest
from command_line import ROOT, run, run_here

TOOL = ROOT / 'tools' / 'get_flops.py'
CLASSIFIER = ROOT / 'configs' / 'classification' / 'efficientvim-m1_300e_in1k.py'


@pytest.fixture
def get_flops(monkeypatch, capsys):
    """Run the tool in this process and return its output."""

    def call(*arguments):
        run_here(monkeypatch, TOOL, *arguments)
        return capsys.readouterr().out

    return call


def line(printed, beginning):
    """Return the rest of the only line with this beginning."""
    (found,) = [text for text in printed.splitlines() if text.startswith(beginning)]
    return found.removeprefix(beginning)


@pytest.mark.slow
def test_counts_a_classifier_at_its_test_size_from_any_folder(tmp_path):
    result = run(TOOL, CLASSIFIER, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    *_, summary = result.stdout.splitlines()
    assert summary == (
        'DistillationClassifier: 6.679458 M parameters, 239.42 MFLOPs (multiply-accumulates) for an image of 224×224'
    )
    assert line(result.stdout, 'Input: ') == "1×3×224×224 (CenterCrop in the config's test pipeline)"
    assert '|   head.heads ' in result.stdout
    assert 'lerp 24' in line(result.stdout, 'Not counted')
    assert 'UNKNOWN' not in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_counts_a_two_stage_detector(get_flops):
    printed = get_flops(ROOT / 'configs/maskrcnn_evm_m1.py', '--shape', 65, 96)
    assert line(printed, 'Input: ') == '1×3×96×96 (as requested, 65×96, padded by the data preprocessor)'
    assert '|  roi_head ' in printed
    assert 'roi_head.bbox_roi_extractor' in line(printed, 'RoIs')
    assert 'NMSop 1' in line(printed, 'UNKNOWN')
    assert line(printed, 'MaskRCNN: 26.898542 M parameters, ').endswith('for an image of 96×96')


def test_counts_a_one_stage_detector_with_config_options_and_depth(get_flops):
    config = ROOT / 'configs/retinanet_evm_m1.py'
    printed = get_flops(config, '--shape', 64, '--depth', 3)
    assert '1×3×64×64 (as requested)' in printed
    assert 'backbone.stages.2' in printed
    small = line(printed, 'RetinaNet: ')
    options = ['model.backbone.arch=m2', 'model.neck.in_channels=[128,256,512]']
    assert line(get_flops(config, '--shape', 64, '--cfg-options', *options), 'RetinaNet: ') != small


def test_counts_the_backbone_only(get_flops):
    printed = get_flops(CLASSIFIER, '--shape', 512, '--backbone-only', '--depth', 0)
    assert 'EfficientViM: 5.713534 M parameters, ' in printed  # the classifier's, less 0.965924 M of its head
    assert 'stages' not in printed
    assert 'for an image of 512×512' in printed


def test_counts_configs_of_installed_packages(get_flops):
    printed = get_flops('mmpretrain::resnet/resnet18_8xb32_in1k.py')
    assert 'ImageClassifier: 11.689512 M parameters, 18' in printed  # He et al. (2016), Table 1: 1.8 GFLOPs
    assert '1×3×224×224' in printed
    printed = get_flops('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', '--shape', 64, '--depth', 1)
    assert 'RetinaNet: 37.968692 M parameters, ' in printed


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere.py'], 'nowhere.py cannot be read'),
        (['mmdet::retinanet/nothing.py'], 'cannot be read'),
        (['mmseg::unet/unet.py'], 'cannot be read'),
        (['mmnothing::retinanet/nothing.py'], 'cannot be read'),
        ([ROOT / 'README.md'], 'cannot be read'),
        ([ROOT / 'configs/_base_/schedule_1x_adamw.py'], 'has no `model`'),
        ([CLASSIFIER, '--backbone-only', '--cfg-options', 'model._delete_=True', 'model.type=TimmClassifier',
          'model.model_name=resnet18'], 'has no backbone'),
    ],
)  # fmt: skip
def test_errors_name_the_problem(get_flops, arguments, message):
    with pytest.raises(SystemExit) as ended:
        get_flops(*arguments)
    assert str(ended.value.code).startswith('ConfigError: ')
    assert message in ended.value.code


@pytest.mark.parametrize('arguments', [['--shape', 1, 2, 3], ['--shape', 0], ['--depth', -1]])
def test_invalid_numbers_are_refused(get_flops, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        get_flops(CLASSIFIER, *arguments)
    assert ended.value.code == 2
    assert str(arguments[-1]) in capsys.readouterr().err.splitlines()[-1]
