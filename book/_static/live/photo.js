'use strict';
/* A photograph made ready for the model: t2t_ref.preprocess once more, byte for byte. Pixels are bytes, red, green and
blue of each, row by row. */
const photo = (() => {
const MEAN = [0.485, 0.456, 0.406], STD = [0.229, 0.224, 0.225], FRACTION = 0.9;

/* the weights by which Pillow mixes old places into each new one: bicubic with a = -0.5, in units of 2^-22 */
function mixtures(before, after) {
  const scale = before / after, wide = Math.max(scale, 1), reach = 2 * wide;
  const cubic = x => x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
  return Array.from({length: after}, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - reach + 0.5), 0);
    const last = Math.min(Math.trunc(centre + reach + 0.5), before);
    const weights = Array.from({length: last - first}, (_, i) => cubic(Math.abs((i + first - centre + 0.5) / wide)));
    const sum = weights.reduce((a, b) => a + b, 0);
    return {first, weights: weights.map(w => Math.trunc(w / sum * 2 ** 22 + (w < 0 ? -0.5 : 0.5)))};
  });
}

/* resizes the places of one direction: each of `lines` lines has `before` of them, `step` bytes apart */
function resizeAlong(pixels, before, after, step, lineStart, count) {
  const result = new Uint8ClampedArray(count * after * 3);
  const mixed = mixtures(before, after);
  return {result, each(line, place, to) {
    const {first, weights} = mixed[place], from = lineStart(line) + first * step;
    for (let colour = 0; colour < 3; colour++) {
      let sum = 2 ** 21;
      for (let i = 0; i < weights.length; i++) sum += pixels[from + i * step + colour] * weights[i];
      result[to + colour] = Math.min(Math.max(Math.floor(sum / 2 ** 22), 0), 255);
    }
  }};
}

function bicubic({pixels, w, h}, columns, rows) {
  if (columns !== w) {
    const {result, each} = resizeAlong(pixels, w, columns, 3, line => line * w * 3, h);
    for (let y = 0; y < h; y++) for (let x = 0; x < columns; x++) each(y, x, (y * columns + x) * 3);
    pixels = result;
  }
  if (rows !== h) {
    const {result, each} = resizeAlong(pixels, h, rows, columns * 3, line => line * 3, columns);
    for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) each(x, y, (y * columns + x) * 3);
    pixels = result;
  }
  return {pixels, w: columns, h: rows};
}

function crop({pixels, w, h}, left, top, columns, rows) {
  const result = new Uint8ClampedArray(columns * rows * 3);
  for (let y = 0; y < rows; y++) {
    const from = ((top + y) * w + left) * 3;
    result.set(pixels.subarray(from, from + columns * 3), y * columns * 3);
  }
  return {pixels: result, w: columns, h: rows};
}

/* Python rounds a half to the even number */
const even = x => x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x);

/* the smallest size, in the image's own proportions, that covers the crop and its margin; then the centre of it */
function centreCrop(image, height, width) {
  const longest = Math.ceil(16 * Math.max(height, width) / Math.min(height, width) * Math.min(image.w, image.h));
  if (Math.max(image.w, image.h) > longest) {
    const [left, top] = [image.w, image.h].map(side => Math.floor(Math.max(side - longest, 0) / 2));
    image = crop(image, left, top, Math.min(image.w, longest), Math.min(image.h, longest));
  }
  let rows = Math.trunc(height / FRACTION), columns = Math.trunc(width / FRACTION);
  if (rows * image.w >= columns * image.h) columns = Math.floor(rows * image.w / image.h);
  else rows = Math.floor(columns * image.h / image.w);
  image = bicubic(image, columns, rows);
  return crop(image, even((columns - width) / 2), even((rows - height) / 2), width, height);
}

/* bytes to maps of c h w, in deviations from the mean of their colour */
function normalise({pixels, w, h}, mean = MEAN, std = STD) {
  const maps = new Float32Array(3 * w * h);
  for (let i = 0; i < w * h; i++) for (let colour = 0; colour < 3; colour++) {
    maps[colour * w * h + i] = (pixels[3 * i + colour] / 255 - mean[colour]) / std[colour];
  }
  return maps;
}

/* the pixels of a file that the browser can open, on white where it is clear */
async function open(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, {colorSpaceConversion: 'none'});
  } catch {
    throw new Error(`${file.name} is no image that this browser reads: save it as PNG or JPEG`);
  }
  const {width: w, height: h} = bitmap, canvas = Object.assign(document.createElement('canvas'), {width: w, height: h});
  const pen = canvas.getContext('2d', {willReadFrequently: true});
  pen.fillStyle = '#fff';
  pen.fillRect(0, 0, w, h);
  pen.drawImage(bitmap, 0, 0);
  const four = pen.getImageData(0, 0, w, h).data, pixels = new Uint8ClampedArray(3 * w * h);
  for (let i = 0; i < w * h; i++) for (let colour = 0; colour < 3; colour++) pixels[3 * i + colour] = four[4 * i + colour];
  return {pixels, w, h};
}

return {bicubic, centreCrop, normalise, open};
})();
