"""The voxels of slices as the scanner meant them, whatever the files are compressed with."""

import tempfile
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from clinfuse.preparation.dicom.headers import read_file
from clinfuse.preparation.dicom.sentences import one_line
from clinfuse.preparation.dicom.stack import Frame


def stack_voxels(frames: Sequence[Frame], modality: str) -> tuple[Float[np.ndarray, "k j i"], int]:
    """The slices in the scanner's units, and how many voxels of padding became air.

    Args:
        frames: of one size, in the order of the volume.
        modality: padding below -1024 HU is looked for in "CT" alone.

    Raises:
        ValueError: pixels that are cut off or that neither pydicom nor GDCM decodes.
    """
    columns, rows = frames[0].size
    voxels = np.empty((len(frames), rows, columns), np.float32)
    wanted: dict[Path, list[int]] = defaultdict(list)
    for k, frame in enumerate(frames):
        wanted[frame.file].append(k)
    padded = 0
    for file, ks in wanted.items():
        dataset = read_file(file)
        stored = _stored(dataset, file)
        for k in ks:
            plane = stored[frames[k].index]
            voxels[k] = plane * frames[k].slope + frames[k].intercept
            if modality == "CT" and (padding := _padding(dataset)):
                outside = (plane >= padding[0]) & (plane <= padding[1]) & (voxels[k] < -1024)
                voxels[k][outside] = -1000
                padded += int(outside.sum())
    return voxels, padded


def _padding(dataset: Dataset) -> tuple[int, int] | None:
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return None
    low, high = sorted((int(value), int(dataset.get("PixelPaddingRangeLimit", value))))
    return low, high


def _stored(dataset: FileDataset, file: Path) -> np.ndarray:
    """Stored values (frame, row, column): by pydicom, and by GDCM what pydicom cannot decode."""
    if "PixelData" not in dataset:
        raise ValueError(f"expected pixels, got a file cut off before them: {file}")
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None or not syntax.is_transfer_syntax:
        raise ValueError(f"expected a transfer syntax, got none that is known: {file}")
    try:
        with warnings.catch_warnings(action="ignore"):
            stored = dataset.pixel_array
    except Exception as error:  # whatever a plug-in raises on bytes that make no image
        if not syntax.is_compressed or not syntax.is_encapsulated:
            raise ValueError(
                f"expected {dataset.Rows} x {dataset.Columns} pixels, got a truncated or corrupt "
                f"file ({one_line(error)}): {file}"
            ) from error
        stored = _by_gdcm(dataset, file)
    return stored.reshape(-1, dataset.Rows, dataset.Columns)


def _by_gdcm(dataset: FileDataset, file: Path) -> np.ndarray:
    """Frames decoded one by one through a bare image of each, for GDCM would rescale the whole."""
    syntax = dataset.file_meta.TransferSyntaxUID
    frames = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            count = int(dataset.get("NumberOfFrames") or 1)
            for frame in generate_frames(dataset.PixelData, number_of_frames=count):
                bare = _bare(dataset)
                bare.PixelData = encapsulate([frame])
                bare["PixelData"].is_undefined_length = True
                bare.save_as(Path(folder) / "frame", enforce_file_format=True)
                reader = sitk.ImageFileReader()
                reader.SetImageIO("GDCMImageIO")
                reader.SetFileName(str(Path(folder) / "frame"))
                frames.append(sitk.GetArrayFromImage(reader.Execute()))
        return np.concatenate(frames)
    except (RuntimeError, ValueError, EOFError) as error:
        raise ValueError(
            f"expected pixels that pydicom or GDCM can decode, got {syntax.name}, which neither "
            f"can here (or a truncated file); convert it to {ExplicitVRLittleEndian.name}: {file}"
        ) from error


def _bare(dataset: FileDataset) -> Dataset:
    bare = Dataset()
    bare.file_meta = FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    bare.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    bare.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    bare.SOPClassUID, bare.SOPInstanceUID = SecondaryCaptureImageStorage, dataset.SOPInstanceUID
    for name in (
        "Rows",
        "Columns",
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "BitsAllocated",
        "BitsStored",
        "HighBit",
        "PixelRepresentation",
    ):
        setattr(bare, name, dataset[name].value)
    return bare
