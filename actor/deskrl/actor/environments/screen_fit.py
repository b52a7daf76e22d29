"""Place of an environment's image on a screen of another size: as large as fits, centred, on black."""

from __future__ import annotations

from dataclasses import dataclass, replace

from PIL import Image

from deskrl.actor.actions import Action


@dataclass(frozen=True)
class ScreenFit:
    """Place of an image on a screen, with the aspect ratio of the image."""

    image_size: tuple[int, int]
    """(width, height) of the image in pixels."""
    screen_size: tuple[int, int]
    """(width, height) of the screen in pixels."""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, width and height of the image on the screen, in pixels."""
        (width, height), (screen_width, screen_height) = self.image_size, self.screen_size
        scale = min(screen_width / width, screen_height / height)
        if scale >= 1:
            scale = int(scale)  # pixels of equal size
        shown_width, shown_height = max(1, int(width * scale)), max(1, int(height * scale))
        return (screen_width - shown_width) // 2, (screen_height - shown_height) // 2, shown_width, shown_height

    def show(self, image: Image.Image) -> Image.Image:
        """Return a screen with the image."""
        left, top, width, height = self.box
        is_enlarged = width >= image.width
        method = Image.Resampling.NEAREST if is_enlarged else Image.Resampling.BOX
        screen = Image.new("RGB", self.screen_size)
        screen.paste(image.resize((width, height), method), (left, top))
        return screen

    def to_image(self, action: Action) -> Action:
        """Return an action on the screen with its points in pixels of the image, possibly outside of it."""
        left, top, width, height = self.box

        def across(x: int) -> int:
            return (x - left) * self.image_size[0] // width

        def down(y: int) -> int:
            return (y - top) * self.image_size[1] // height

        return replace(
            action, x=across(action.x), y=down(action.y), end_x=across(action.end_x), end_y=down(action.end_y)
        )
