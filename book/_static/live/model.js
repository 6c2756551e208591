'use strict';
/* T2T-ViT and ViT, from pixels to logits: chapters 3 to 10 of the book once more, in JavaScript.

Tokens are the rows of one Float32Array: n rows of d numbers, token after token. A weight is {shape, data}, laid out as
PyTorch has it. run() answers with the logits and with all that the page draws. Everything lies inside one function, so
that its text can be handed to a worker. */
const makeModel = () => {
const SPLITS = [[7, 4, 2], [3, 2, 1], [3, 2, 1]];  // kernel, stride, padding (chapter 6)

/* ---- the arithmetic that every layer uses */

/* x W^T + bias for n tokens; the weight has one row for each number of the result */
function linear(x, n, weight, bias) {
  const w = weight.data, f = weight.shape[0], d = w.length / f, y = new Float32Array(n * f);
  product(x, w, y, n, d, f);
  if (bias) for (let i = 0; i < y.length; i++) y[i] += bias.data[i % f];
  return y;
}

/* y[i, j] = sum of x[i, :] w[j, :], four results at a time */
let product = (x, w, y, n, d, f) => {
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < f; j += 4) {
      let a = 0, b = 0, c = 0, e = 0;
      const row = i * d, one = j * d, two = one + d, three = two + d, four = three + d;
      if (j + 4 <= f) {
        for (let k = 0; k < d; k++) {
          const value = x[row + k];
          a += value * w[one + k]; b += value * w[two + k]; c += value * w[three + k]; e += value * w[four + k];
        }
        y[i * f + j] = a; y[i * f + j + 1] = b; y[i * f + j + 2] = c; y[i * f + j + 3] = e;
      } else {
        for (let rest = j; rest < f; rest++) {
          a = 0;
          for (let k = 0; k < d; k++) a += x[row + k] * w[rest * d + k];
          y[i * f + rest] = a;
        }
      }
    }
  }
};

/* kernel.wat, assembled: the same product in WebAssembly, ten times as fast */
const KERNEL = 'AGFzbQEAAAABCgFgBn9/f39/fwADAgEABQMBAAEHFAIGbWVtb3J5AgAHcHJvZHVjdAAACrcFAbQFAgV/C3sDQCABIQggBSEGA0D9DAAAAAAAAAAA' +
  'AAAAAAAAAAAhDv0MAAAAAAAAAAAAAAAAAAAAACEP/QwAAAAAAAAAAAAAAAAAAAAAIRD9DAAAAAAAAAAAAAAAAAAAAAAhEf0MAAAAAAAAAAAAAAAA' +
  'AAAAACES/QwAAAAAAAAAAAAAAAAAAAAAIRP9DAAAAAAAAAAAAAAAAAAAAAAhFP0MAAAAAAAAAAAAAAAAAAAAACEVQQAhBwNAIAAgB2ohCSAJ/QAE' +
  'ACELIAkgBGr9AAQAIQwgCCAHaiEJIAn9AAQAIQ0gDiALIA395gH95AEhDiASIAwgDf3mAf3kASESIAkgBGohCSAJ/QAEACENIA8gCyAN/eYB/eQB' +
  'IQ8gEyAMIA395gH95AEhEyAJIARqIQkgCf0ABAAhDSAQIAsgDf3mAf3kASEQIBQgDCAN/eYB/eQBIRQgCSAEaiEJIAn9AAQAIQ0gESALIA395gH9' +
  '5AEhESAVIAwgDf3mAf3kASEVIAdBEGohByAHIARJDQALIAIgBUECdGohCiACIA79HwAgDv0fAZIgDv0fAiAO/R8DkpI4AgAgAiAP/R8AIA/9HwGS' +
  'IA/9HwIgD/0fA5KSOAIEIAIgEP0fACAQ/R8BkiAQ/R8CIBD9HwOSkjgCCCACIBH9HwAgEf0fAZIgEf0fAiAR/R8DkpI4AgwgCiAS/R8AIBL9HwGS' +
  'IBL9HwIgEv0fA5KSOAIAIAogE/0fACAT/R8BkiAT/R8CIBP9HwOSkjgCBCAKIBT9HwAgFP0fAZIgFP0fAiAU/R8DkpI4AgggCiAV/R8AIBX9HwGS' +
  'IBX9HwIgFf0fA5KSOAIMIAJBEGohAiAIIARBAnRqIQggBkEEayEGIAYNAAsgAiAFQQJ0aiECIAAgBEEBdGohACADQQJrIQMgAw0ACwsAggEEbmFt' +
  'ZQJiAQAWAAF4AQF3AgF5AwFuBAFkBQFmBgFqBwFrCAFwCQFxCgViZWxvdwsDb25lDAN0d28NBndlaWdodA4DczAwDwNzMDEQA3MwMhEDczAzEgNz' +
  'MTATA3MxMRQDczEyFQNzMTMDFwEAAwAEcm93cwEHY29sdW1ucwIDc3Vt';

/* takes the product over to the kernel; false where the browser or the site's policy allows no WebAssembly */
function withKernel() {
  let exports;
  try {
    const bytes = Uint8Array.from(atob(KERNEL), letter => letter.charCodeAt(0));
    ({exports} = new WebAssembly.Instance(new WebAssembly.Module(bytes)));
  } catch {
    return false;
  }
  const {memory} = exports, plain = product;
  /* rows of d numbers into the kernel's memory, each filled up with zeros to a multiple of four */
  const put = (values, at, rows, d, padded) => {
    const view = new Float32Array(memory.buffer, 4 * at, rows * padded);
    if (d === padded) return view.set(values.subarray(0, rows * d));
    for (let row = 0; row < rows; row++) {
      view.set(values.subarray(row * d, (row + 1) * d), row * padded);
      view.fill(0, row * padded + d, (row + 1) * padded);
    }
  };
  product = (x, w, y, n, d, f) => {
    if (n * d * f < 4096) return plain(x, w, y, n, d, f);
    const [rows, padded, results] = [n + n % 2, d + 3 & ~3, f + 3 & ~3];
    const second = rows * padded, third = second + results * padded, missing = 4 * (third + rows * results) - memory.buffer.byteLength;
    if (missing > 0) memory.grow(Math.ceil(missing / 65536));
    put(x, 0, n, d, padded);
    put(w, second, f, d, padded);
    exports.product(0, 4 * second, 4 * third, rows, 4 * padded, results);
    const found = new Float32Array(memory.buffer, 4 * third, rows * results);
    for (let row = 0; row < n; row++) y.set(found.subarray(row * results, row * results + f), row * f);
  };
  return true;
}

/* each token to mean 0 and deviation 1, then its own scale and shift for each number */
function layerNorm(x, n, weight, bias, epsilon) {
  const d = weight.data.length, y = new Float32Array(n * d);
  for (let i = 0; i < n; i++) {
    let mean = 0, variance = 0;
    for (let k = i * d; k < (i + 1) * d; k++) mean += x[k] / d;
    for (let k = i * d; k < (i + 1) * d; k++) variance += (x[k] - mean) ** 2 / d;
    const scale = 1 / Math.sqrt(variance + epsilon);
    for (let k = 0; k < d; k++) y[i * d + k] = (x[i * d + k] - mean) * scale * weight.data[k] + bias.data[k];
  }
  return y;
}

/* x times the chance that a normal number is below x. erf by Abramowitz and Stegun 7.1.26 would be off by 1e-7 near 0,
where most numbers are: a series there, and a continued fraction further out */
function gelu(x) {
  const z = Math.abs(x) / Math.SQRT2;
  let tail;  // 1 - erf(z)
  if (z < 2.5) {
    let term = z, sum = z;
    for (let k = 1; Math.abs(term) > 1e-12 * sum; k++) {
      term *= -z * z / k;
      sum += term / (2 * k + 1);
    }
    tail = 1 - sum * 2 / Math.sqrt(Math.PI);
  } else {
    let fraction = z;
    for (let k = 24; k > 0; k--) fraction = z + k / 2 / fraction;
    tail = Math.exp(-z * z) / Math.sqrt(Math.PI) / fraction;
  }
  return x * (x < 0 ? tail / 2 : 1 - tail / 2);
}

/* numbers whose sum is 1, in the place of numbers of any size; returns the logarithm of the sum of exponentials */
function softmax(x, first, count, step = 1) {
  let most = -Infinity, sum = 0;
  for (let k = 0; k < count; k++) most = Math.max(most, x[first + k * step]);
  for (let k = 0; k < count; k++) sum += x[first + k * step] = Math.exp(x[first + k * step] - most);
  for (let k = 0; k < count; k++) x[first + k * step] /= sum;
  return most + Math.log(sum);
}

/* columns from..from + width of n rows */
function columns(x, n, from, width) {
  const d = x.length / n, y = new Float32Array(n * width);
  for (let i = 0; i < n; i++) y.set(x.subarray(i * d + from, i * d + from + width), i * width);
  return y;
}

const add = (x, y) => x.map((value, i) => value + y[i]);

/* ---- tokens from maps, maps from tokens (chapters 3 and 6) */

const places = (length, [kernel, stride, padding]) => Math.floor((length + 2 * padding - kernel) / stride) + 1;

/* every window, row by row, becomes a token: channel slowest, then row, then column; outside the image there is 0 */
function softSplit(maps, channels, [h, w], split) {
  const [kernel, stride, padding] = split, grid = [places(h, split), places(w, split)], area = kernel * kernel;
  const tokens = new Float32Array(grid[0] * grid[1] * channels * area);
  let at = 0;
  for (let row = 0; row < grid[0]; row++) for (let column = 0; column < grid[1]; column++) {
    for (let c = 0; c < channels; c++) for (let y = 0; y < kernel; y++) for (let x = 0; x < kernel; x++, at++) {
      const above = row * stride - padding + y, left = column * stride - padding + x;
      if (above >= 0 && above < h && left >= 0 && left < w) tokens[at] = maps[(c * h + above) * w + left];
    }
  }
  return {tokens, grid};
}

/* token i becomes the pixel i of d maps: rows and columns change places */
function restructure(tokens, n) {
  const d = tokens.length / n, maps = new Float32Array(tokens.length);
  for (let i = 0; i < n; i++) for (let k = 0; k < d; k++) maps[k * n + i] = tokens[i * d + k];
  return maps;
}

/* ---- attention in the T2T layers (chapters 4 and 5): every function answers {mixed, row}, and row(q) gives the
weights by which token q mixes the values */

function exactAttention(queries, keys, values, n, scale) {
  const e = values.length / n, mixed = new Float32Array(n * e);
  const row = q => {
    const weights = new Float32Array(n);
    product(queries.subarray(q * e, (q + 1) * e), keys, weights, 1, e, n);
    for (let k = 0; k < n; k++) weights[k] *= scale;
    softmax(weights, 0, n);
    return weights;
  };
  const across = restructure(values, n);
  for (let q = 0; q < n; q++) product(row(q), across, mixed.subarray(q * e, (q + 1) * e), 1, n, e);
  return {mixed, row};
}

/* w . x - |x|^2 / 2 for each token and each random direction */
function logFeatures(x, n, directions) {
  const m = directions.shape[0], e = x.length / n, logs = linear(x, n, directions);
  for (let i = 0; i < n; i++) {
    let square = 0;
    for (let k = i * e; k < (i + 1) * e; k++) square += x[k] * x[k] / 2;
    for (let j = 0; j < m; j++) logs[i * m + j] -= square;
  }
  return logs;
}

function performerAttention(queries, keys, values, n, directions, epsilon) {
  const m = directions.shape[0], e = values.length / n;
  const overTokens = logFeatures(keys, n, directions), overFeatures = logFeatures(queries, n, directions);
  const totals = new Float32Array(m), means = new Float32Array(m * e), mixed = new Float32Array(n * e);
  for (let j = 0; j < m; j++) {  // each feature takes a mean of the values
    totals[j] = softmax(overTokens, j, n, m);
    for (let k = 0; k < n; k++) for (let i = 0; i < e; i++) {
      means[j * e + i] += overTokens[k * m + j] * values[k * e + i];
    }
  }
  const kept = new Float32Array(n), silent = new Uint8Array(n);
  for (let q = 0; q < n; q++) {  // each query mixes the means
    for (let j = 0; j < m; j++) overFeatures[q * m + j] += totals[j];
    const logDenominator = softmax(overFeatures, q * m, m) - Math.log(m);
    kept[q] = epsilon > 0 ? 1 / (1 + Math.exp(Math.log(epsilon) - logDenominator)) : 1;
    silent[q] = logDenominator < Math.log(1e-8) ? 1 : 0;
    for (let j = 0; j < m; j++) for (let i = 0; i < e; i++) {
      mixed[q * e + i] += kept[q] * overFeatures[q * m + j] * means[j * e + i];
    }
  }
  const row = q => Float32Array.from({length: n}, (_, k) => {
    let weight = 0;
    for (let j = 0; j < m; j++) weight += overFeatures[q * m + j] * overTokens[k * m + j];
    return weight * kept[q];
  });
  return {mixed, row, kept, silent};
}

/* a T2T layer: 147 or 576 numbers become token_dim; the shortcut goes around the attention, on the values */
function tokenLayer(x, n, part, model, options) {
  const weight = name => model.weights[`tokens_to_token.${part}.${name}`], e = model.arguments.token_dim;
  const seen = layerNorm(x, n, weight('norm1.weight'), weight('norm1.bias'), 1e-5);
  const exact = model.arguments.tokens_type === 'transformer';
  let queries, keys, values, attention;
  if (exact) {
    [queries, keys, values] = [0, e, 2 * e].map(from => columns(linear(seen, n, weight('attn.qkv.weight')), n, from, e));
    attention = exactAttention(queries, keys, values, n, (x.length / n) ** -0.5);
  } else {
    const kqv = linear(seen, n, weight('kqv.weight'), weight('kqv.bias'));  // keys come first
    [keys, queries, values] = [0, e, 2 * e].map(from => columns(kqv, n, from, e));
    attention = performerAttention(queries, keys, values, n, weight('w'), options.epsilon);
  }
  const name = exact ? 'attn.proj' : 'proj', [first, last] = exact ? ['mlp.fc1', 'mlp.fc2'] : ['mlp.0', 'mlp.2'];
  const given = options.tokenAttention ? attention.mixed : new Float32Array(attention.mixed.length);
  const tokens = add(values, linear(given, n, weight(`${name}.weight`), weight(`${name}.bias`)));
  const normed = layerNorm(tokens, n, weight('norm2.weight'), weight('norm2.bias'), 1e-5);
  const hidden = linear(normed, n, weight(`${first}.weight`), weight(`${first}.bias`)).map(gelu);
  return {tokens: add(tokens, linear(hidden, n, weight(`${last}.weight`), weight(`${last}.bias`))), attention};
}

/* ---- a block of the backbone (chapter 8) */

function block(x, n, number, model, options) {
  const weight = name => model.weights[`blocks.${number}.${name}`], epsilon = model.normEpsilon;
  const d = model.arguments.embed_dim, heads = model.arguments.num_heads, e = d / heads;
  const seen = layerNorm(x, n, weight('norm1.weight'), weight('norm1.bias'), epsilon);
  const qkv = linear(seen, n, weight('attn.qkv.weight'), weight('attn.qkv.bias'));
  const mixed = new Float32Array(n * d), attention = [];
  for (let head = 0; head < heads; head++) {
    const [queries, keys, values] = [0, d, 2 * d].map(from => columns(qkv, n, from + head * e, e));
    const weights = new Float32Array(n * n), scale = model.arguments.qk_scale ?? e ** -0.5;
    product(queries, keys, weights, n, e, n);
    for (let i = 0; i < weights.length; i++) weights[i] *= scale;
    for (let q = 0; q < n; q++) softmax(weights, q * n, n);
    attention.push(weights);
    if (options.headOff?.block === number && options.headOff.head === head) continue;
    const own = new Float32Array(n * e);
    product(weights, restructure(values, n), own, n, n, e);
    for (let q = 0; q < n; q++) mixed.set(own.subarray(q * e, (q + 1) * e), q * d + head * e);
  }
  const tokens = add(x, linear(mixed, n, weight('attn.proj.weight'), weight('attn.proj.bias')));
  const normed = layerNorm(tokens, n, weight('norm2.weight'), weight('norm2.bias'), epsilon);
  const hidden = linear(normed, n, weight('mlp.fc1.weight'), weight('mlp.fc1.bias')).map(gelu);
  return {tokens: add(tokens, linear(hidden, n, weight('mlp.fc2.weight'), weight('mlp.fc2.bias'))), attention};
}

/* ---- the whole (chapters 6, 7, 9 and 10) */

/* image to tokens, and each step on the way: [{name, tokens, grid}] */
function tokensOf(image, size, model, options) {
  const steps = [], weight = name => model.weights[name];
  const keep = (name, tokens, grid, more) => steps.push({name, tokens, grid, ...more});
  if (model.kind === 'ViT') {
    const kernel = model.arguments.patch_size;
    const {tokens, grid} = softSplit(image, model.arguments.in_chans, size, [kernel, kernel, 0]);
    keep('hard split', tokens, grid);
    keep('tokens', linear(tokens, grid[0] * grid[1], weight('patch_embed.proj.weight'), weight('patch_embed.proj.bias')), grid);
    return steps;
  }
  let maps = image, channels = model.arguments.in_chans;
  SPLITS.forEach((split, number) => {
    const {tokens, grid} = softSplit(maps, channels, size, split), n = grid[0] * grid[1];
    keep(`soft split ${number + 1}`, tokens, grid);
    let next;
    if (number === 2 || model.arguments.tokens_type === 'convolution') {
      const part = number === 2 ? 'project' : `soft_split${number}`;
      next = {tokens: linear(tokens, n, weight(`tokens_to_token.${part}.weight`), weight(`tokens_to_token.${part}.bias`))};
    } else next = tokenLayer(tokens, n, `attention${number + 1}`, model, options);
    keep(number === 2 ? 'tokens' : `T2T layer ${number + 1}`, next.tokens, grid, {attention: next.attention});
    maps = restructure(next.tokens, n);
    channels = next.tokens.length / n;
    size = grid;
  });
  return steps;
}

/* image: c maps of h x w, normalised. options: epsilon of the performers; tokenAttention, false leaves the values alone;
positions, an order of the table's rows (the class token's stays); headOff {block, head} */
function run(model, image, size, options = {}) {
  options = {epsilon: model.arguments.performer_epsilon, tokenAttention: true, ...options};
  const steps = tokensOf(image, size, model, options), {tokens, grid} = steps.at(-1);
  const d = model.arguments.embed_dim, n = grid[0] * grid[1] + 1, table = model.weights.pos_embed.data;
  if (table.length !== n * d) throw new Error(`the position table has ${table.length / d} rows, the image makes ${n} tokens`);
  let x = new Float32Array(n * d);
  x.set(model.weights.cls_token.data);
  x.set(tokens, d);
  const rows = [0, ...(options.positions ?? Array.from({length: n - 1}, (_, i) => i)).map(row => row + 1)];
  x = x.map((value, i) => value + table[rows[Math.floor(i / d)] * d + i % d]);
  const blocks = [];
  for (let number = 0; number < model.arguments.depth; number++) {
    blocks.push(block(x, n, number, model, options));
    x = blocks.at(-1).tokens;
  }
  const last = layerNorm(x, n, model.weights['norm.weight'], model.weights['norm.bias'], model.normEpsilon);
  const logits = linear(last.subarray(0, d), 1, model.weights['head.weight'], model.weights['head.bias']);
  const probabilities = Float32Array.from(logits);
  softmax(probabilities, 0, logits.length);
  return {logits, probabilities, steps, blocks, grid};
}

/* ---- a model from a file of save_checkpoint */

const half = bits => {
  const sign = bits >> 15 ? -1 : 1, power = bits >> 10 & 31, part = bits & 1023;
  return sign * (power === 31 ? (part ? NaN : Infinity) : power ? (1 + part / 1024) * 2 ** (power - 15) : part * 2 ** -24);
};

function numbers(bytes, dtype) {
  const buffer = bytes.slice().buffer;
  if (dtype === 'F32') return new Float32Array(buffer);
  if (dtype === 'F16') return Float32Array.from(new Uint16Array(buffer), half);
  if (dtype === 'BF16') return new Float32Array(Uint32Array.from(new Uint16Array(buffer), bits => bits << 16).buffer);
  if (dtype === 'F64') return Float32Array.from(new Float64Array(buffer));
  throw new Error(`numbers of the type ${dtype} are not read here`);
}

/* bytes of a safetensors file to {kind, arguments, weights, normEpsilon}; what the page cannot run is refused by name */
function readModel(bytes) {
  const length = bytes.length < 8 ? NaN : Number(new DataView(bytes.buffer, bytes.byteOffset, 8).getBigUint64(0, true));
  if (!(length > 1 && length <= bytes.length - 8)) throw new Error('this is not a safetensors file: write one with save_checkpoint(model, path)');
  let header;
  try {
    header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  } catch {
    throw new Error('this is not a safetensors file: write one with save_checkpoint(model, path)');
  }
  const {__metadata__: about = {}, ...entries} = header;
  if (!about.class || !about.arguments) throw new Error('this file does not say which model it holds: write it with save_checkpoint(model, path)');
  if (!['T2TViT', 'ViT'].includes(about.class)) throw new Error(`a ${about.class} does not run here: T2TViT and ViT do`);
  const weights = {};
  for (const [name, {dtype, shape, data_offsets: [from, to]}] of Object.entries(entries)) {
    if (8 + length + to > bytes.length) throw new Error('the file ends too early: it was not copied whole');
    weights[name] = {shape, data: numbers(bytes.subarray(8 + length + from, 8 + length + to), dtype)};
  }
  const settings = JSON.parse(about.arguments), size = settings.img_size;
  if (settings.num_classes === 0) throw new Error('this model has no head: num_classes is 0');
  return {
    kind: about.class, arguments: settings, weights, normEpsilon: about.class === 'ViT' ? 1e-6 : 1e-5,
    size: Array.isArray(size) ? size : [size, size],
  };
}

return {
  SPLITS, places, run, readModel, softSplit, restructure, layerNorm, gelu,
  withKernel,
};
};
