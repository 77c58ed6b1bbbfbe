"""Start and resume trainings from files given by mistake or made to run code."""

import functools
import os
import pickle
import re
import zipfile

import pytest
import torch
from foreign_files import (
    PLACES,
    Custom,
    assert_arrived,
    half,
    other_arch,
    safetensors,
    saved,
    sentence,
    trained_parts,
    within,
)
from malicious import Call
from mmengine.config import Config
from mmengine.logging import HistoryBuffer

from mmevm.checkpoints import CheckpointError
from mmevm.engine.training_state import check_training_checkpoint

pytestmark = pytest.mark.filterwarnings('ignore')


def without(*keys):
    return lambda content: {key: value for key, value in content.items() if key not in keys}


def remembered(**values):
    return lambda content: within('message_hub', runtime_info=content['message_hub']['runtime_info'] | values)(content)


TRAININGS = {
    'weights and meta': (without('optimizer', 'message_hub', 'param_schedulers'), 'holds weights only'),
    'no message hub': (without('message_hub'), 'holds weights only.*message_hub'),
    'no meta': (without('meta'), 'holds weights only.*meta'),
    'bare state dict': (lambda content: content['state_dict'], 'holds weights only'),
    'list': (list, 'holds a list'),
    'epoch that is no number': (within('meta', epoch='2'), "no valid meta\\['epoch'\\]"),
    'negative iteration': (within('meta', iter=-1), "no valid meta\\['epoch'\\]"),
    'other message hub': (lambda content: content | {'message_hub': {'log': {}}}, 'not mmengine'),
    'a file to remove': (remembered(best_ckpt='/home/user'), "best_ckpt='/home/user'"),
    'steps to remove': (remembered(keep_ckpt_ids=['/../../user']), 'keep_ckpt_ids=.*user'),
    'half of the keys': (lambda content: content | {'state_dict': half(content['state_dict'])}, r'\d+ missing'),
    'other arch': (lambda content: content | {'state_dict': other_arch(content['state_dict'])}, 'another shape'),
    'object of another class': (within('meta', custom=Custom()), r'names foreign_files\.Custom'),
    'NaN': (
        lambda content: content | {'state_dict': {k: v * torch.nan for k, v in content['state_dict'].items()}},
        'NaN or infinite values',
    ),
}


@pytest.mark.parametrize('file', TRAININGS)
def test_resume_refuses_incomplete_and_unsafe_checkpoints(place, trained, file, tmp_path):
    change, message = TRAININGS[file]
    path = saved(change(trained), tmp_path / 'given.pth')
    assert re.search(message, sentence(place.resume, path))


def test_truncated_pickle_in_a_valid_archive_is_refused(trained, tmp_path):
    complete, path = saved(trained, tmp_path / 'complete.pth'), tmp_path / 'cut.pth'
    with zipfile.ZipFile(complete) as source, zipfile.ZipFile(path, 'w') as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data[: len(data) // 2] if name.endswith('data.pkl') else data)
    with pytest.raises(CheckpointError, match=rf'{path} is cut off or damaged'):
        check_training_checkpoint(path)


@pytest.mark.parametrize('layout', ['legacy', 'safetensors'])
def test_resume_refuses_legacy_and_safetensors_files(place, trained, layout, tmp_path):
    path = tmp_path / 'given.pth'
    if layout == 'legacy':
        saved(trained, path, _use_new_zipfile_serialization=False)
    else:
        safetensors(trained, path)
    assert re.search('old format' if layout == 'legacy' else 'holds weights only', sentence(place.resume, path))


@pytest.mark.parametrize('layout', ['zip', 'legacy', 'safetensors'])
def test_training_starts_from_a_complete_file(place, state, layout, tmp_path, capsys):
    path = tmp_path / 'given.pth'
    if layout == 'safetensors':
        safetensors({'state_dict': state}, path)
    else:
        saved({'state_dict': state, 'meta': Custom()}, path, _use_new_zipfile_serialization=layout == 'zip')
    assert_arrived(trained_parts(place.start(path)), trained_parts(state))
    assert re.search(rf'Loaded {len(state)}/{len(state)} tensors of \w+ from {path}\.\n', capsys.readouterr().out)


def test_training_with_other_classes_keeps_random_classifiers(place, state, tmp_path, capsys):
    given = {name: torch.cat([value] * 2) if 'head.heads' in name else value for name, value in state.items()}
    others = [name for name in state if given[name].shape != state[name].shape]
    path = saved({'state_dict': given}, tmp_path / 'given.pth')
    arrived = place.start(path)
    assert_arrived(*({n: v for n, v in trained_parts(part).items() if n not in others} for part in (arrived, state)))
    printed = capsys.readouterr().out
    assert re.search(
        rf'Loaded {len(state) - len(others)}/{len(state)} tensors of \w+ from {path}\. The others keep', printed
    )
    assert f'{len(others)} of another shape ({others[0]}: ' in printed


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda state: {f'net.{name}': value for name, value in state.items()},
            r'has no tensor of \w+: of \d+, .*net\.',
        ),
        (lambda state: {name: value * torch.nan for name, value in state.items()}, 'NaN or infinite'),
    ],
)
def test_load_from_refuses_other_networks_and_invalid_values(place, state, change, message, tmp_path):
    path = saved({'state_dict': change(state)}, tmp_path / 'given.pth')
    assert re.search(message, sentence(place.start, path))


def test_resume_from_a_training_checkpoint(place, trained, tmp_path):
    path = saved(trained, tmp_path / 'given.jpg')
    assert 'best_ckpt' in trained['message_hub']['runtime_info']
    assert isinstance(trained['message_hub']['log_scalars']['train/loss'], HistoryBuffer)
    assert check_training_checkpoint(path) == trained['meta']
    arrived = place.resume(path)
    assert_arrived(trained_parts(arrived), trained_parts(trained['state_dict']))


def test_resume_of_the_config_is_checked_too(place, trained, tmp_path):
    path = saved(trained, tmp_path / 'given.pth')
    start = functools.partial(place.start, options=['resume=True', 'train_cfg.max_epochs=2'])
    assert_arrived(trained_parts(start(path)), trained_parts(trained['state_dict']))
    mark = tmp_path / 'mark'
    saved(in_meta(trained, mark, Call(os.system, f'touch {mark}')), path)
    assert 'Nothing was run' in sentence(start, path)
    assert not mark.exists()


@pytest.mark.skipif(not hasattr(torch.serialization, 'safe_globals'), reason='of torch 2.5')
def test_registered_custom_class_is_accepted(trained, tmp_path):
    path = saved(within('meta', custom=Custom())(trained), tmp_path / 'given.pth')
    with torch.serialization.safe_globals([Custom]):
        assert check_training_checkpoint(path)['epoch'] == 1


def in_meta(content, mark, evil):
    return content | {'meta': {**content['meta'], 'evil': evil}}


def called(content, mark, evil):
    return evil


def beside(content, mark, evil):
    return content | {'evil': evil}


def in_state_dict(content, mark, evil):
    return content | {'state_dict': {**content['state_dict'], 'evil': evil}}


def in_place_of_a_tensor(content, mark, evil):
    name = 'backbone.patch_embed.conv.0.conv.weight'
    return content | {'state_dict': {**content['state_dict'], name: evil}}


ATTACKS = {
    'called': called,
    'beside': beside,
    'in state_dict': in_state_dict,
    'in place of a tensor': in_place_of_a_tensor,
    'in meta': in_meta,
}


IGNORED = ('beside', 'in state_dict', 'in meta')  # all weights are there, and other objects are not used


@pytest.mark.parametrize('name', PLACES)
@pytest.mark.parametrize(
    ('attack', 'layout'),
    [*((attack, 'zip') for attack in ATTACKS), ('called', 'legacy'), ('called', 'pickle'), ('beside', 'legacy')],
)
def test_no_code_from_the_file_is_run(place, content, name, attack, layout, tmp_path):
    mark, path = tmp_path / 'mark', tmp_path / 'given.pth'
    content = ATTACKS[attack](content, mark, Call(os.system, f'touch {mark}'))
    if layout == 'pickle':
        path.write_bytes(pickle.dumps(content))
        pickle.loads(path.read_bytes())
    else:
        saved(content, path, _use_new_zipfile_serialization=layout == 'zip')
        torch.load(path, weights_only=False)
    assert mark.exists(), 'the attack itself does not work'
    mark.unlink()
    ignored = (*IGNORED, 'in place of a tensor') if name == 'start' else IGNORED  # which may skip tensors
    if name != 'resume' and layout != 'pickle' and attack in ignored:
        getattr(place, name)(path)
    else:
        printed = sentence(getattr(place, name), path)
        if name == 'resume' and layout == 'zip':
            assert f'{os.system.__module__}.system' in printed
    assert not mark.exists()


@pytest.mark.parametrize('way', ['attribute', 'protocol 4', 'config'])
def test_resume_runs_no_code_from_the_file(place, trained, way, tmp_path):
    mark, path = tmp_path / 'mark', tmp_path / 'given.pth'
    command = f'touch {mark}'
    if way == 'config':  # mmengine's Runner.resume would run it
        text = f'__import__("os").system({command!r})\n'  # an import statement would be parsed lazily
        Config.fromstring(text, '.py')
        saved(within('meta', config=text)(trained), path)
        message = r"meta\['config'\]"
    else:
        # getattr leads from a function to the globals of its module, and from there to builtins.
        names = Call(getattr, HistoryBuffer.min, '__builtins__')
        evil = Call(Call(getattr, names, 'get'), 'eval') if way == 'attribute' else Call(os.system, command)
        if way == 'attribute':
            evil = Call(evil, f'__import__("os").system({command!r})')
        saved({'evil': evil, **trained}, path, pickle_protocol=2 if way == 'attribute' else 4)
        torch.load(path, weights_only=False)
        message = '__builtins__ of|min of|getattr' if way == 'attribute' else r'posix\.system|nt\.system'
    assert mark.exists(), 'the attack itself does not work'
    mark.unlink()
    assert re.search(message, sentence(place.resume, path))
    assert not mark.exists()
