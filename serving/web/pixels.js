// From the answers' bytes to pixels: pure functions over typed arrays.

export const NOTHING = 255;  // the id of pixels that belong to no class

// COCO's text form of run lengths: 5 bits a character, from the fourth on relative to the one two before.
export function unpack(text) {
  const counts = [];
  for (let at = 0; at < text.length;) {
    let value = 0, shift = 0, five;
    do { five = text.charCodeAt(at++) - 48; value += (five & 31) * 2 ** shift; shift += 5; } while (five & 32);
    if (five & 16) value -= 2 ** shift;
    counts.push(counts.length > 2 ? value + counts[counts.length - 2] : value);
  }
  return counts;
}

// {width, height} to show an image in: its own, or scaled so that neither side is above `most`.
export function shownSize(width, height, most = 2048) {
  const scale = Math.min(1, most / Math.max(width, height));
  return { width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)) };
}

// For n places over N pixels (n <= N): which pixel a place shows, the one at its middle.
export const middle = (place, n, N) => Math.floor((2 * place + 1) * N / (2 * n));

// Class id of each pixel of the answer, at the size it is shown in: no more memory than that, however large the image.
export function labels(answer, { width, height }) {
  const found = new Uint8Array(width * height).fill(NOTHING);
  const column = new Int32Array(answer.width).fill(-1);  // where a column of the answer is shown, if it is
  for (let x = 0; x < width; x++) column[middle(x, width, answer.width)] = x;
  const above = new Int32Array(answer.height + 1);  // how many shown rows lie above a row of the answer
  for (let y = 0; y < height; y++) above[middle(y, height, answer.height) + 1]++;
  for (let row = 0; row < answer.height; row++) above[row + 1] += above[row];
  for (const { id, rle } of answer.classes) {
    let at = 0, inside = false;  // runs go down the columns
    for (const count of unpack(rle.counts)) {
      for (let from = at; inside && from < at + count;) {
        const source = Math.floor(from / answer.height), top = from - source * answer.height;
        const bottom = Math.min(answer.height, top + at + count - from);
        if (column[source] >= 0)
          for (let y = above[top]; y < above[bottom]; y++) found[y * width + column[source]] = id;
        from += bottom - top;
      }
      at += count; inside = !inside;
    }
  }
  return found;
}

const ink = ([red, green, blue]) => (255 << 24 | blue << 16 | green << 8 | red) >>> 0;  // as little-endian RGBA

// id -> colour, 0 (clear) for classes that are hidden and for no class.
export function inks(classes, hidden) {
  const table = new Uint32Array(256);
  for (const { id, color } of classes) if (!hidden.has(id)) table[id] = ink(color);
  return table;
}

// Unsure is bright, sure is dark; lightness falls all the way, so it also reads in grey and to the colour-blind.
const STOPS = [[252, 246, 178], [250, 187, 92], [226, 105, 75], [150, 48, 100], [70, 22, 94], [16, 12, 44]];
export const heat = Uint32Array.from({ length: 256 }, (_, value) => {
  const place = value / 255 * (STOPS.length - 1), low = Math.min(Math.floor(place), STOPS.length - 2);
  return ink(STOPS[low].map((from, i) => Math.round(from + (place - low) * (STOPS[low + 1][i] - from))));
});

// The layer over the image: colours by class, or by confidence (bytes, 0..255 = 0..1) where a class is shown.
export function paint(label, { width, height }, table, confidence = null) {
  const layer = new ImageData(width, height), pixels = new Uint32Array(layer.data.buffer);
  for (let i = 0; i < label.length; i++) {
    const own = table[label[i]];
    pixels[i] = own && confidence ? heat[confidence[i]] : own;
  }
  return layer;
}
