"""The one table of finding codes: default severity, what it means, how to mend it.

A code is never renamed or reused. `mend` names the automatic repair of `--fix`, where there is one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


class CodeInfo(NamedTuple):
    """One kind of finding."""

    severity: Severity
    title: str
    fix: str
    mend: str = ""


CODES: dict[str, CodeInfo] = {
    # files
    "file-missing": CodeInfo(
        "error",
        "image file is missing",
        "Restore the file or remove the image and its annotations.",
        "drop-image",
    ),
    "file-unreadable": CodeInfo(
        "error",
        "image file cannot be decoded",
        "Replace the file or remove the image.",
        "drop-image",
    ),
    "file-truncated": CodeInfo(
        "error",
        "image file is cut off",
        "Copy the file again from its source or remove the image.",
        "drop-image",
    ),
    "file-empty": CodeInfo(
        "error",
        "image file has zero bytes",
        "Copy the file again from its source or remove the image.",
        "drop-image",
    ),
    "file-bomb": CodeInfo(
        "error",
        "image has more pixels than allowed (decompression bomb)",
        "Remove or shrink the image, or raise max_pixels if it is genuine.",
        "drop-image",
    ),
    "file-extension": CodeInfo(
        "warning",
        "file extension does not fit the content",
        "Rename the file to the extension of its real format.",
        "rename-file",
    ),
    "file-case": CodeInfo(
        "error",
        "file name differs in upper and lower case from the file on disk",
        "Use exactly the same spelling; other machines tell upper from lower case.",
        "use-disk-name",
    ),
    "file-name-invalid": CodeInfo(
        "error",
        "file name is empty, not text, or leads outside the images folder",
        "Use a name relative to the images folder, with forward slashes.",
        "drop-image",
    ),
    "file-name-portability": CodeInfo(
        "info",
        "file name has spaces or characters outside ASCII",
        "Prefer letters, digits, '-', '_' and '.': some tools and storages alter other names.",
    ),
    "file-unreferenced": CodeInfo(
        "warning",
        "file in the images folder that no annotation file names",
        "Add it to the annotations (background images too) or remove it.",
        "leave-out-file",
    ),
    "file-stray": CodeInfo(
        "info",
        "file in the images folder that is neither an image nor an annotation file",
        "Keep notes and archives outside the images folder.",
        "leave-out-file",
    ),
    "file-repeated": CodeInfo(
        "warning",
        "two image records name the same file",
        "Merge the records into one.",
        "merge-images",
    ),
    "image-size-mismatch": CodeInfo(
        "error",
        "image size differs from the annotation file",
        "Correct width and height, or export the boxes again for the image as it is.",
        "rescale",
    ),
    "image-exif-rotated": CodeInfo(
        "warning",
        "EXIF asks viewers to rotate the image; training reads the pixels as stored",
        "Rotate the pixels for good and remove the tag, then check that the boxes fit.",
        "strip-exif",
    ),
    "image-mode": CodeInfo(
        "warning",
        "colour mode that does not become RGB faithfully",
        "Convert the image to 8-bit RGB.",
        "convert-rgb",
    ),
    "image-animated": CodeInfo(
        "info", "file holds several frames", "Only the first frame is used; split the file."
    ),
    # annotation files
    "annotation-file-missing": CodeInfo(
        "error",
        "folder of a split has no annotation file",
        "Export the split again, or remove its folder.",
    ),
    "json-malformed": CodeInfo(
        "error", "annotation file is not valid JSON", "Correct the file at the given line."
    ),
    "json-structure": CodeInfo(
        "error",
        "annotation file does not have the COCO structure",
        "Write an object with the lists images, annotations and categories.",
        "drop-record",
    ),
    "yaml-malformed": CodeInfo(
        "error", "data.yaml is not valid YAML", "Correct the file at the given line."
    ),
    "yaml-path": CodeInfo(
        "warning",
        "path in data.yaml does not exist; the usual folder takes its place",
        "Correct the path.",
    ),
    "yaml-structure": CodeInfo(
        "error",
        "data.yaml does not describe a dataset",
        "Give names (list, or numbers from 0 to names), nc equal to their count, and the splits.",
    ),
    "key-missing": CodeInfo(
        "error", "a required key is missing", "Add the key to the record.", "drop-record"
    ),
    "value-type": CodeInfo(
        "error", "a value has the wrong type", "Write a number of the right kind.", "drop-record"
    ),
    "image-size-invalid": CodeInfo(
        "error",
        "width or height of an image record is not a positive number",
        "Write the size of the image in pixels.",
        "set-size",
    ),
    "image-id-duplicate": CodeInfo(
        "error",
        "two images have the same id",
        "Give each image its own id.",
        "drop-record",
    ),
    "annotation-id-duplicate": CodeInfo(
        "error", "two annotations have the same id", "Give each its own id.", "renumber"
    ),
    "annotation-id-zero": CodeInfo(
        "warning",
        "annotation id is 0, which the COCO metric takes for 'not matched'",
        "Number annotations from 1.",
        "renumber",
    ),
    "category-id-duplicate": CodeInfo(
        "error", "two categories have the same id", "Give each category its own id."
    ),
    "category-id-range": CodeInfo(
        "error",
        "category id of plain COCO cannot be a label",
        "Number the categories from 1, without large gaps.",
    ),
    "categories-missing": CodeInfo(
        "error", "category list is empty", "List the categories of the annotations."
    ),
    "image-id-unknown": CodeInfo(
        "error",
        "annotation of an image that is not listed",
        "Add the image or remove the annotation.",
        "drop-annotation",
    ),
    "category-id-unknown": CodeInfo(
        "error",
        "annotation of a category that is not listed",
        "Add the category or remove the annotation.",
        "drop-annotation",
    ),
    "label-line-malformed": CodeInfo(
        "error",
        "label line is neither a box (5 numbers) nor a polygon (class and pairs)",
        "Write 'class cx cy w h' or 'class x1 y1 x2 y2 x3 y3 ...' in fractions.",
        "drop-annotation",
    ),
    "label-class-range": CodeInfo(
        "error",
        "class number outside the names of data.yaml",
        "Use class numbers from 0 to the number of names minus 1.",
        "drop-annotation",
    ),
    "label-unreferenced": CodeInfo(
        "warning",
        "label file without an image",
        "Add the image or remove the label file.",
        "leave-out-file",
    ),
    "label-shared": CodeInfo(
        "warning",
        "two images differ only in extension and share one label file",
        "Rename one of the images and give it its own labels.",
    ),
    # boxes
    "box-malformed": CodeInfo(
        "error", "bbox is not a list of four numbers", "Write [x, y, w, h].", "drop-annotation"
    ),
    "box-non-numeric": CodeInfo(
        "error", "bbox holds something that is not a number", "Write numbers.", "drop-annotation"
    ),
    "box-nan": CodeInfo(
        "error",
        "bbox holds NaN or infinity",
        "Write finite numbers or remove the annotation.",
        "drop-annotation",
    ),
    "box-negative": CodeInfo(
        "error",
        "bbox has a negative width or height",
        "Write x, y of the top left corner, then a positive size.",
        "drop-annotation",
    ),
    "box-zero-area": CodeInfo(
        "error",
        "bbox has no area; training drops it",
        "Remove the annotation or draw the box again.",
        "drop-annotation",
    ),
    "box-outside": CodeInfo(
        "warning",
        "bbox leaves the image; training cuts it",
        "Clip the box to the image.",
        "clip-box",
    ),
    "box-outside-fully": CodeInfo(
        "error",
        "bbox lies outside the image; training drops it",
        "Remove the annotation or correct the box.",
        "drop-annotation",
    ),
    "box-duplicate": CodeInfo(
        "warning",
        "same box and category twice in one image",
        "Remove one of the two.",
        "drop-annotation",
    ),
    "box-near-duplicate": CodeInfo(
        "warning",
        "two nearly equal boxes of one category in one image",
        "Remove one of the two.",
        "drop-annotation",
    ),
    "box-conflict": CodeInfo(
        "info",
        "nearly the same box with two different categories",
        "Decide for one category.",
    ),
    "box-aspect": CodeInfo(
        "warning", "absurd aspect ratio of a box", "Check the box; it may be a stray line."
    ),
    "box-sub-pixel": CodeInfo(
        "info",
        "box is under one pixel at the model's resolution",
        "Use a larger resolution, tiles, or remove the annotation.",
    ),
    "image-too-many-boxes": CodeInfo(
        "warning",
        "image has more boxes than the model has queries",
        "Raise num_queries or cut the image into tiles.",
    ),
    "area-invalid": CodeInfo(
        "warning",
        "area is missing, not a number, or not positive",
        "Write the area in square pixels.",
        "set-area",
    ),
    "area-mismatch": CodeInfo(
        "warning",
        "area disagrees with the box",
        "Write w * h, or the area of the mask.",
        "set-area",
    ),
    "iscrowd-invalid": CodeInfo("warning", "iscrowd is neither 0 nor 1", "Write 0 or 1."),
    # masks
    "polygon-malformed": CodeInfo(
        "error",
        "segmentation is not a list of polygons with x, y pairs of numbers",
        "Write [[x1, y1, x2, y2, x3, y3, ...], ...].",
        "drop-polygon",
    ),
    "polygon-short": CodeInfo(
        "warning",
        "polygon has fewer than 3 points",
        "Remove the polygon or draw it again.",
        "drop-polygon",
    ),
    "polygon-outside": CodeInfo(
        "warning", "polygon leaves the image", "Clip the polygon to the image.", "clip-polygon"
    ),
    "rle-malformed": CodeInfo(
        "error",
        "RLE mask is damaged or not of the image's size",
        "Write {counts, size: [height, width]} of the image.",
        "drop-polygon",
    ),
    # categories
    "category-ghost": CodeInfo(
        "info",
        "category is only the parent of others and is dropped from the classes",
        "Remove it from categories to keep other tools from counting it as a class.",
    ),
    "category-unused": CodeInfo(
        "warning",
        "class without a single annotation in any split",
        "Annotate it or remove it: it costs an output and can never be learned.",
    ),
    "category-name-duplicate": CodeInfo(
        "error", "two categories have the same name", "Merge or rename them."
    ),
    "category-name-invalid": CodeInfo(
        "error", "category name is empty or not text", "Give the category a name."
    ),
    "category-split-differs": CodeInfo(
        "error",
        "category table differs between splits",
        "Use the same ids and names in every split.",
    ),
    "class-missing": CodeInfo(
        "warning",
        "class has no annotation in one of the splits",
        "Move images between splits so that every split holds every class.",
    ),
    "class-imbalance": CodeInfo(
        "info", "classes are very unevenly filled", "Collect more of the rare classes."
    ),
    # splits
    "split-missing": CodeInfo(
        "error", "split is missing", "Add the split: training needs train and valid."
    ),
    "split-test-missing": CodeInfo(
        "info", "no test split; the valid split takes its place", "Keep images aside for a test."
    ),
    "split-empty": CodeInfo("error", "split has no images", "Move images into the split."),
    "split-unannotated": CodeInfo(
        "error", "split has images but not one annotation", "Annotate it or remove it."
    ),
    "split-size": CodeInfo(
        "warning", "split is out of proportion", "Divide the images again, for example 80/10/10."
    ),
    "split-duplicate-image": CodeInfo(
        "error",
        "the same image is in two splits",
        "Keep it in one split: leaked images make every metric too good.",
        "drop-image",
    ),
    "split-near-duplicate": CodeInfo(
        "warning",
        "nearly the same image is in two splits",
        "Keep both in one split, for example split by scene or video.",
    ),
    "image-duplicate": CodeInfo(
        "info", "the same image is twice in one split", "Keep one of the two."
    ),
    # statistics
    "share-empty": CodeInfo(
        "info", "large share of images without boxes", "Check that annotations were not lost."
    ),
    "version-class-shift": CodeInfo(
        "info",
        "share of a class moved since the previous version",
        "Check that the change is meant.",
    ),
    "version-images-removed": CodeInfo(
        "info", "images of the previous version are gone", "Check that the change is meant."
    ),
}
