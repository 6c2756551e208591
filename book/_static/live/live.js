'use strict';
/* The page of the live model: what is drawn goes into model.js, and all that comes out is shown. The drawing lives in an
array of its own and is never read back from the canvas: some browsers answer that with noise. */
const live = (() => {
const SIDE = 64, ALL = 3 * SIDE, GROUND = 0.2, INK = 0.85, PEN = 3.4, MEAN = 0.4, STD = 0.25, EPSILON = 1e-8;
const $ = id => document.getElementById(`live-${id}`);
const folder = document.currentScript.src.replace(/[^/]*$/, '');
const model = makeModel(), models = {}, waiting = {}, state = {
  drawing: new Float32Array(3 * ALL * ALL).fill(GROUND), shift: [0, 0], rgb: null, pixel: [32, 32], pen: false, inked: false,
  kind: 't2t', result: null, steps: {}, order: shuffled(16), digits: [], moved: '', said: 0, shown: 0,
};
state.rgb = view();

/* ---- scripts that bring weights and digits; classic ones, since file:// refuses everything else */

function need(name) {
  waiting[name] ??= new Promise((resolve, reject) => {
    const script = Object.assign(document.createElement('script'), {src: `${folder}${name}.js`, onload: resolve});
    script.onerror = () => { delete waiting[name]; reject(new Error(`${name}.js did not load`)); };
    document.head.append(script);
  });
  return waiting[name];
}
model.withKernel();
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const take = (name, text) => { models[name] = model.readModel(bytes(text)); };
const takeDigits = list => { state.digits = list.map(({label, pixels}) => ({label, pixels: bytes(pixels)})); };

/* the same order for everybody */
function shuffled(n) {
  const order = Array.from({length: n}, (_, i) => i);
  for (let i = n - 1, seed = 7; i > 0; i--) {
    seed = (seed * 16807) % 2147483647;
    [order[i], order[seed % (i + 1)]] = [order[seed % (i + 1)], order[i]];
  }
  return order;
}

/* ---- the drawing: three times as wide and high as what the model sees of it, so that a shift loses nothing */

function place(c, row, column) { return (c * ALL + SIDE + row - state.shift[0]) * ALL + SIDE + column - state.shift[1]; }
function view() {
  const area = SIDE * SIDE;
  return Float32Array.from({length: 3 * area}, (_, i) => state.drawing[place(Math.floor(i / area), Math.floor(i / SIDE) % SIDE, i % SIDE)]);
}
function clear() {
  state.drawing.fill(GROUND);
  state.shift = [0, 0];
}
function stroke(fromX, fromY, toX, toY) {
  const steps = Math.ceil(Math.hypot(toX - fromX, toY - fromY) * 2) + 1;
  for (let step = 0; step <= steps; step++) dot(fromX + (toX - fromX) * step / steps, fromY + (toY - fromY) * step / steps);
}
/* a round pen with a soft edge of one pixel */
function dot(x, y) {
  const [first, last] = [-SIDE, 2 * SIDE - 1].map(end => state.shift.map(by => by + end));
  for (let row = Math.max(Math.floor(y - PEN - 1), first[0]); row <= Math.min(y + PEN + 1, last[0]); row++) {
    for (let column = Math.max(Math.floor(x - PEN - 1), first[1]); column <= Math.min(x + PEN + 1, last[1]); column++) {
      const part = Math.min(Math.max(PEN + 0.5 - Math.hypot(column + 0.5 - x, row + 0.5 - y), 0), 1);
      for (let c = 0; c < 3; c++) {
        const at = place(c, row, column);
        state.drawing[at] = Math.max(state.drawing[at], GROUND + (INK - GROUND) * part);
      }
    }
  }
}
/* a picture in the place of the drawing; around it its ground, the middle colour of its rim */
function put(pixels, change = value => value) {
  state.shift = [0, 0];
  for (let c = 0; c < 3; c++) {
    const values = Array.from({length: SIDE * SIDE}, (_, i) => change(pixels[3 * i + c] / 255));
    const rim = values.filter((_, i) => i < SIDE || i >= SIDE * (SIDE - 1) || i % SIDE % (SIDE - 1) === 0).sort((a, b) => a - b);
    state.drawing.fill(rim[rim.length >> 1], c * ALL * ALL, (c + 1) * ALL * ALL);
    values.forEach((value, i) => { state.drawing[place(c, Math.floor(i / SIDE), i % SIDE)] = value; });
  }
  drawn();
}
/* a file: its middle, in grey, light on dark as the model was trained */
async function dropped(file) {
  const image = photo.centreCrop(await photo.open(file), SIDE, SIDE), area = SIDE * SIDE;
  let rim = 0;
  for (let i = 0; i < SIDE; i++) for (let c = 0; c < 3; c++) rim += (image.pixels[3 * i + c] + image.pixels[3 * (area - 1 - i) + c]) / 6 / SIDE / 255;
  const dark = rim < 0.5;
  say(dark ? '' : 'The picture was dark on light and has been inverted.');
  put(image.pixels, dark ? undefined : value => 1 - value);
}

/* ---- running */

function options() {
  const [block, head] = $('head').value.split(',').map(Number);
  return {
    epsilon: $('epsilon').checked ? 0 : EPSILON, tokenAttention: !$('values').checked,
    positions: $('shuffle').checked ? state.order : undefined,
    headOff: $('head').value ? {block, head} : undefined,
  };
}
const normalised = rgb => rgb.map(value => (value - MEAN) / STD);
function answer(kind = state.kind, rgb = state.rgb) {
  return model.run(models[kind], normalised(rgb), [SIDE, SIDE], options());
}

const wanted = () => document.querySelector('#live-root input[name=live-kind]:checked').value;
let queued = false;
/* other tokens: what the last shift did to them is no longer true */
function drawn() {
  state.moved = '';
  changed();
}
function changed() {
  if (queued) return;
  queued = true;
  requestAnimationFrame(async () => {
    queued = false;
    const kind = wanted();
    state.rgb = view();
    drawPad();
    try { await need(kind); } catch (error) { return say(error.message); }
    if (kind !== wanted()) return changed();
    const start = performance.now();
    state.kind = kind;
    state.result = answer();
    draw();
    $('time').textContent = `${Math.max(Math.round(performance.now() - start), 1)} ms from the pixels to this page`;
    $('root').dataset.answered = ++state.shown;
  });
}

/* what one pixel of shift does to the tokens, in both models */
async function shift(...by) {
  const names = {t2t: 'T2T-ViT', vit: 'ViT'}, kinds = Object.keys(names);
  for (const kind of kinds) await need(kind);
  const tokens = () => kinds.map(kind => answer(kind, view()).steps.at(-1).tokens), before = tokens();
  state.shift = state.shift.map((at, axis) => Math.min(Math.max(at + by[axis], -SIDE), SIDE));
  state.moved = tokens().map((now, k) => {
    const length = Math.hypot(...before[k]), change = Math.hypot(...now.map((value, i) => value - before[k][i]));
    return `${names[kinds[k]]}: its 16 tokens moved by ${Math.round(100 * change / length)} % of their length`;
  }).join('; ') + '.';
  changed();
}
function whereItIs() {
  const words = [['up', 'down'], ['left', 'right']], [down, right] = state.shift;
  const parts = [down, right].map((by, axis) => by && `${Math.abs(by)} ${words[axis][by > 0 ? 1 : 0]}`).filter(Boolean);
  return parts.length ? `Shifted: ${parts.join(', ')}. ` : state.moved && 'Back in its place. ';
}

/* ---- pictures */

const CIVIDIS = [[0, 34, 78], [26, 56, 111], [67, 78, 108], [97, 101, 111], [125, 124, 120],
  [155, 148, 118], [188, 174, 108], [222, 201, 88], [254, 232, 56]];
function colour(at) {
  const i = Math.min(Math.floor(Math.min(Math.max(at, 0), 1) * 8), 7), part = Math.min(Math.max(at, 0), 1) * 8 - i;
  return CIVIDIS[i].map((first, k) => first + (CIVIDIS[i + 1][k] - first) * part);
}
/* blue below 0, red above */
const signed = at => at < 0 ? [255 * (1 + at), 255 * (1 + at * 0.55), 255] : [255, 255 * (1 - at * 0.8), 255 * (1 - at)];

function paint(canvas, w, h, rgb) {
  canvas.width = w;
  canvas.height = h;
  const data = new ImageData(w, h);
  for (let i = 0; i < w * h; i++) {
    const [r, g, b, opaque = 255] = rgb(i);
    data.data.set([r, g, b, opaque], 4 * i);
  }
  canvas.getContext('2d').putImageData(data, 0, 0);
}
function heat(canvas, w, h, values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  paint(canvas, w, h, i => colour(high > low ? (values[i] - low) / (high - low) : 0.5));
  return [low, high];
}
const MARK = [213, 94, 0], CLEAR = [0, 0, 0, 0], pixelColours = i => [0, 1, 2].map(c => 255 * state.rgb[c * SIDE * SIDE + i]);

/* the drawing, and a ring where the keys hold the pen */
function drawPad() {
  const [row, column] = state.pixel;
  paint($('pad'), SIDE, SIDE, i => {
    const far = Math.hypot(i % SIDE - column, Math.floor(i / SIDE) - row);
    return state.pen && Math.abs(far - PEN - 1) < 0.5 ? MARK : pixelColours(i);
  });
}

/* the windows of the first split that hold a pixel: [first, last] row and column of tokens */
function windows() {
  const [kernel, stride, padding] = state.kind === 't2t' ? model.SPLITS[0] : [16, 16, 0];
  const grid = state.result.steps[0].grid;
  return {kernel, stride, padding, ranges: state.pixel.map((at, axis) => [
    Math.max(Math.ceil((at + padding - kernel + 1) / stride), 0), Math.min(Math.floor((at + padding) / stride), grid[axis] - 1),
  ])};
}

function draw() {
  const {result} = state, t2t = state.kind === 't2t', names = result.steps.map(step => step.name);
  fillSteps();
  fillHeads();
  drawPad();
  drawSeen();
  drawAnswer();
  drawTable();
  // maps of a step
  const step = result.steps[Math.max(names.indexOf($('step').value), 0)], n = step.grid[0] * step.grid[1];
  const width = step.tokens.length / n, channel = Math.min(Number($('channel').value), width - 1);
  Object.assign($('channel'), {max: width - 1});
  $('channel-value').textContent = `${channel + 1} of ${width}`;
  const maps = model.restructure(step.tokens, n);
  const [low, high] = heat($('maps'), step.grid[1], step.grid[0], maps.subarray(channel * n, (channel + 1) * n));
  $('maps-facts').textContent = `${step.name}: ${step.grid[0]} x ${step.grid[1]} places, from ${low.toFixed(2)} (dark) to ${high.toFixed(2)} (bright)`;
  // the T2T layers
  const off = $('values').checked;
  $('layers').hidden = !t2t;
  $('heard').hidden = off;
  $('unheard').hidden = !off;
  if (t2t && !off) [1, 3].forEach((number, i) => {
    const {attention, grid} = result.steps[number], places = state.pixel.map((at, axis) => Math.floor(at * grid[axis] / SIDE));
    const token = places[0] * grid[1] + places[1], {silent} = attention, count = silent.reduce((a, b) => a + b, 0);
    heat($(`layer${i + 1}`), grid[1], grid[0], attention.row(token));
    const shown = `token (${places.join(', ')}) ${silent[token] ? 'among them' : 'is not'}`;
    $(`silent${i + 1}`).textContent = `${count} of ${silent.length} tokens are silent, ${shown}` +
      ($('epsilon').checked && count ? '; with epsilon 0 all are heard' : '');
  });
  drawClassToken();
  const table = models[state.kind].weights.pos_embed, d = table.shape[2], rows = table.shape[1];
  let most = 0;
  for (const value of table.data) most = Math.max(most, Math.abs(value));
  const order = [0, ...($('shuffle').checked ? state.order : state.order.map((_, i) => i)).map(row => row + 1)];
  paint($('positions'), d, rows, i => signed(table.data[order[Math.floor(i / d)] * d + i % d] / most));
}

function drawSeen() {
  const scale = 6, canvas = $('seen');
  paint(canvas, SIDE, SIDE, pixelColours);
  const small = document.createElement('canvas');
  paint(small, SIDE, SIDE, pixelColours);
  canvas.width = canvas.height = SIDE * scale;
  const pen = canvas.getContext('2d');
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, 0, 0, SIDE * scale, SIDE * scale);
  const {kernel, stride, padding, ranges: [[top, bottom], [left, right]]} = windows();
  pen.strokeStyle = '#D55E00';
  for (let row = top; row <= bottom; row++) for (let column = left; column <= right; column++) {
    pen.lineWidth = 3;
    pen.strokeRect((column * stride - padding) * scale + 1.5, (row * stride - padding) * scale + 1.5, kernel * scale - 3, kernel * scale - 3);
  }
  pen.fillStyle = '#D55E00';
  pen.fillRect(state.pixel[1] * scale, state.pixel[0] * scale, scale, scale);
  const count = (bottom - top + 1) * (right - left + 1), [rows, cols] = state.result.steps[0].grid;
  $('windows').textContent = `Pixel (${state.pixel.join(', ')}) lies in ${count} of ${rows * cols} windows: ` +
    `${bottom - top + 1} above each other, ${right - left + 1} side by side.`;
}

function drawAnswer() {
  const shares = [...state.result.probabilities], order = shares.map((_, i) => i).sort((a, b) => shares[b] - shares[a]);
  shares.forEach((share, digit) => {
    const cells = $('bars').rows[digit].cells;
    cells[1].firstChild.style.width = `${100 * share}%`;
    cells[2].textContent = `${(100 * share).toFixed(1)} %`;
  });
  const {rgb} = state, area = SIDE * SIDE, empty = rgb.every((value, i) => value === rgb[i - i % area]);
  const name = state.kind === 't2t' ? 'T2T-ViT' : 'ViT', most = `${(100 * shares[order[0]]).toFixed(0)} %`;
  const text = empty ? `Nothing is drawn. ${name} can only name a digit: ${order[0]}, ${most}.` :
    `${name} reads a ${order[0]}, ${most} sure; next, ${order[1]}.`;
  $('answer').textContent = text;
  clearTimeout(state.said);  // a screen reader hears the digit after a pause, not at every move
  state.said = setTimeout(() => { if ($('said').textContent !== text) $('said').textContent = text; }, 400);
  const where = whereItIs() + state.moved;
  if ($('shifted').textContent !== where) $('shifted').textContent = where;
}

function drawTable() {
  const rows = state.result.steps.map(({name, tokens, grid}) => [name, `${grid[0]} x ${grid[1]}`, grid[0] * grid[1], tokens.length / grid[0] / grid[1]]);
  const {embed_dim: d, depth, token_dim: e, patch_size: patch} = models[state.kind].arguments;
  rows.push([`class token, positions, ${depth} blocks`, '', state.result.grid[0] * state.result.grid[1] + 1, d]);
  $('splits').textContent = state.kind === 't2t' ?
    `A token gets wider where a split packs the values of a whole window into it: 7 x 7 x 3 = 147, then 3 x 3 x ${e} = ${9 * e}. ` +
    `Each T2T layer squeezes it back to ${e}, so that the width stays in hand; in the end it gets the ${d} of the blocks. ` +
    'Fewer tokens come from the stride, the step from window to window: 4, then 2, then 2.' :
    `One hard split: windows of ${patch} x ${patch} pixels, side by side. Each packs its ${patch} x ${patch} x 3 = ` +
    `${3 * patch * patch} values into a token, of which a linear layer makes the ${d} of the blocks.`;
  $('stages').replaceChildren(...rows.map(texts => {
    const row = document.createElement('tr');
    row.append(...texts.map(text => Object.assign(document.createElement('td'), {textContent: text})));
    return row;
  }));
}

/* the steps and heads that can be chosen are those of the model */
function fillSteps() {
  const steps = state.result.steps.map(step => step.name);
  if ($('step').options.length !== steps.length) {
    $('step').replaceChildren(...steps.map(name => new Option(name)));
    $('step').value = state.steps[state.kind] ?? steps.find(name => name.startsWith('T2T')) ?? steps.at(-1);
  }
}
const chosen = () => $('looked').value.split(',').map(Number);
function fillHeads() {
  const pairs = state.result?.blocks.flatMap(({attention}, block) => attention.map((_, head) => [block, head])) ?? [];
  const choices = pairs.map(([block, head]) => [`block ${block + 1}, head ${head + 1}`, `${block},${head}`]);
  if ($('looked').options.length !== choices.length) {
    const last = choices.length ? choices.at(-1)[1] : '0,0';
    $('looked').replaceChildren(...choices.map(([text, value]) => new Option(text, value)));
    $('looked').value = last;
    $('head').replaceChildren(new Option('none', ''), ...choices.map(([text, value]) => new Option(text, value)));
    const labels = [['rows', 'block', pairs.at(-1)[0]], ['columns', 'head', pairs.at(-1)[1]]];
    for (const [id, word, last] of labels) $(id).replaceChildren(...Array.from({length: last + 1}, (_, i) => {
      return Object.assign(document.createElement('span'), {textContent: `${word} ${i + 1}`});
    }));
  }
}
/* one picture of all heads: blocks downwards, heads side by side, a frame around the chosen one, none of the one that is off */
function drawClassToken() {
  const {blocks, grid: [rows, cols]} = state.result, heads = blocks[0].attention.length, scale = 8, gap = 3;
  const wide = cols * scale + gap, high = rows * scale + gap, n = rows * cols + 1, w = heads * wide + gap;
  const most = blocks.map(({attention}) => attention.map(weights => Math.max(...weights.subarray(1, n))));
  const [block, head] = chosen(), {headOff} = options(), off = (b, h) => headOff?.block === b && headOff.head === h;
  paint($('attention'), w, blocks.length * high + gap, i => {
    const x = i % w, y = Math.floor(i / w), h = Math.floor(x / wide), b = Math.floor(y / high);
    const [row, column] = [y % high, x % wide].map(along => Math.floor((along - gap) / scale));
    if (row >= 0 && column >= 0) return off(b, h) ? CLEAR : colour(blocks[b].attention[h][1 + row * cols + column] / most[b][h]);
    const framed = x >= head * wide && x < (head + 1) * wide + gap && y >= block * high && y < (block + 1) * high + gap;
    return framed ? MARK : CLEAR;
  });
  const weights = blocks[block].attention[head].subarray(0, n), top = weights.indexOf(Math.max(...weights.subarray(1)), 1) - 1;
  $('attention-facts').textContent = `Block ${block + 1}, head ${head + 1}` + (off(block, head) ?
    ' is switched off: it mixes nothing, so there is nothing to draw.' :
    `: ${(100 * weights[0]).toFixed(0)} % stays with the class token itself; ` +
    `the largest part of the rest goes to token (${Math.floor(top / cols)}, ${top % cols}).`);
  $('over').hidden = off(block, head);
  paint($('over'), SIDE, SIDE, i => {
    const token = Math.floor(Math.floor(i / SIDE) * rows / SIDE) * cols + Math.floor(i % SIDE * cols / SIDE);
    const part = 0.75 * weights[1 + token] / most[block][head];
    return pixelColours(i).map((value, c) => value + ([230, 159, 0][c] - value) * part);
  });
  const splits = state.kind === 't2t' ? 'three soft splits leave' : 'one hard split leaves';
  $('remain').textContent = `${rows} x ${cols} tokens are all that ${splits} of ${SIDE} x ${SIDE} pixels.`;
}

/* ---- the reader's own model, in a worker where the browser allows one */

const own = {file: null, picture: null};
function inWorker(file, maps, size) {
  return new Promise((resolve, reject) => {
    const text = `const model = (${makeModel})();
      model.withKernel();
      onmessage = ({data: {file, maps, size}}) => {
        try {
          const found = model.readModel(file), {probabilities, blocks, grid} = model.run(found, maps, size);
          postMessage({probabilities, grid, attention: blocks.at(-1).attention});
        } catch (error) { postMessage({error: error.message}); }
      };`;
    const url = URL.createObjectURL(new Blob([text], {type: 'text/javascript'})), worker = new Worker(url);
    const end = () => { worker.terminate(); URL.revokeObjectURL(url); };
    worker.onmessage = ({data}) => { end(); data.error ? reject(new Error(data.error)) : resolve(data); };
    worker.onerror = () => { end(); reject(Object.assign(new Error('no worker'), {noWorker: true})); };
    worker.postMessage({file, maps, size});
  });
}
function onPage(file, maps, size) {
  const {probabilities, blocks, grid} = model.run(model.readModel(file), maps, size);
  return {probabilities, grid, attention: blocks.at(-1).attention};
}
async function runOwn() {
  if (!own.file || !own.picture) return;
  const start = performance.now(), out = $('own-answer');
  out.textContent = 'computing ...';
  try {
    const file = new Uint8Array(await own.file.arrayBuffer()), {size, arguments: {num_classes: classes}} = model.readModel(file);
    const image = photo.centreCrop(await photo.open(own.picture), ...size), digits = size[0] === SIDE && classes === 10;
    const maps = digits ? photo.normalise(image, [MEAN, MEAN, MEAN], [STD, STD, STD]) : photo.normalise(image);
    let found;
    try { found = await inWorker(file, maps, size); } catch (error) {
      if (!error.noWorker) throw error;
      found = onPage(file, maps, size);
    }
    if (classes === 1000) await need('classes');
    const names = classes === 1000 ? state.classes : null;
    const top = [...found.probabilities].map((share, i) => [share, i]).sort((a, b) => b[0] - a[0]).slice(0, 5);
    out.textContent = top.map(([share, i]) => `${names ? names[i] : `class ${i}`} ${(100 * share).toFixed(1)} %`).join(', ') +
      ` (${Math.round(performance.now() - start)} ms)`;
    const [rows, cols] = found.grid, n = rows * cols + 1, mean = new Float32Array(n - 1);
    for (const weights of found.attention) for (let i = 1; i < n; i++) mean[i - 1] += weights[i] / found.attention.length;
    const most = Math.max(...mean), {w, h, pixels} = image;
    $('own-map').hidden = false;
    paint($('own-map'), w, h, i => {
      const share = mean[Math.floor(Math.floor(i / w) * rows / h) * cols + Math.floor(i % w * cols / w)] / most;
      return [0, 1, 2].map(c => pixels[3 * i + c] * (0.25 + 0.75 * share));
    });
  } catch (error) {
    out.textContent = error.message;
  }
}

/* ---- the controls */

function say(text) { $('note').textContent = text; }
function at(event, canvas) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * SIDE / box.width, (event.clientY - box.top) * SIDE / box.height];
}
function point(x, y) {
  state.pixel = [y, x].map(value => Math.min(Math.max(Math.floor(value), 0), SIDE - 1));
  state.result ? draw() : drawPad();
}
/* an arrow key moves the pixel, which is also the pen */
function arrows(event) {
  const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
  if (!step) return false;
  event.preventDefault();
  const far = event.shiftKey ? 8 : 1;
  point(state.pixel[1] + step[1] * far, state.pixel[0] + step[0] * far);
  return true;
}

function begin() {
  document.documentElement.classList.add('live-runs');
  const skip = document.getElementById('pst-skip-link'), toDrawing = skip?.cloneNode(true);
  if (skip) {
    Object.assign(toDrawing.querySelector('a'), {href: '#live-pad', textContent: 'Skip to the drawing'});
    skip.after(Object.assign(toDrawing, {id: 'live-skip'}));
  }
  $('root').hidden = false;
  $('bars').replaceChildren(...Array.from({length: 10}, (_, digit) => {
    const row = document.createElement('tr'), head = Object.assign(document.createElement('th'), {textContent: digit, scope: 'row'});
    const bar = document.createElement('td'), number = document.createElement('td');
    bar.append(Object.assign(document.createElement('span'), {className: 'live-bar'}));
    bar.style.width = '65%';
    row.append(head, bar, number);
    return row;
  }));
  const pad = $('pad');
  let last = null;
  pad.addEventListener('pointerdown', event => {
    pad.setPointerCapture(event.pointerId);
    state.pen = false;
    last = at(event, pad);
    dot(...last);
    point(...last);
    drawn();
  });
  pad.addEventListener('pointermove', event => {
    const here = at(event, pad);
    if (last) { stroke(...last, ...here); last = here; drawn(); }
    point(...here);
  });
  for (const name of ['pointerup', 'pointercancel']) pad.addEventListener(name, () => { last = null; });
  pad.addEventListener('keydown', event => {
    const [row, column] = state.pixel, ink = event.key === ' ' || event.key === 'Enter';
    state.pen = true;
    if (ink) event.preventDefault();
    if (arrows(event) ? !state.inked : !ink || event.repeat) return;
    state.inked ||= event.key === ' ';
    stroke(column + 0.5, row + 0.5, state.pixel[1] + 0.5, state.pixel[0] + 0.5);
    drawn();
  });
  pad.addEventListener('keyup', event => { state.inked &&= event.key !== ' '; });
  for (const name of ['focus', 'blur']) pad.addEventListener(name, () => {
    state.pen = pad.matches(':focus-visible');
    state.inked = false;
    drawPad();
  });
  const seen = $('seen');
  seen.addEventListener('pointermove', event => point(...at(event, seen)));
  seen.addEventListener('pointerdown', event => point(...at(event, seen)));
  seen.addEventListener('keydown', arrows);
  $('attention').addEventListener('click', event => {
    const {blocks} = state.result, box = $('attention').getBoundingClientRect();
    const which = (part, count) => Math.min(Math.max(Math.floor(part * count), 0), count - 1);
    const block = which((event.clientY - box.top) / box.height, blocks.length);
    $('looked').value = `${block},${which((event.clientX - box.left) / box.width, blocks[0].attention.length)}`;
    draw();
  });
  $('clear').addEventListener('click', () => { clear(); drawn(); });
  $('invert').addEventListener('click', () => { state.drawing = state.drawing.map(value => 1 - value); drawn(); });
  document.querySelectorAll('#live-digits button').forEach((button, digit) => button.addEventListener('click', async () => {
    try { await need('digits'); put(state.digits[digit].pixels); } catch (error) { say(error.message); }
  }));
  document.querySelectorAll('#live-root input[name=live-kind]').forEach(input => input.addEventListener('change', () => {
    for (const id of ['epsilon', 'values']) $(id).disabled = input.value === 'vit';
    changed();
  }));
  for (const id of ['epsilon', 'values']) $(id).addEventListener('change', drawn);
  for (const id of ['shuffle', 'head']) $(id).addEventListener('change', changed);
  $('step').addEventListener('input', () => { state.steps[state.kind] = $('step').value; });
  for (const id of ['step', 'channel', 'looked']) $(id).addEventListener('input', () => state.result && draw());
  for (const [id, down, right] of [['up', -1, 0], ['down', 1, 0], ['left', 0, -1], ['right', 0, 1]]) {
    $(id).addEventListener('click', () => shift(down, right).catch(error => say(error.message)));
  }
  $('file').addEventListener('change', event => event.target.files[0] && dropped(event.target.files[0]).catch(error => say(error.message)));
  pad.addEventListener('dragover', event => event.preventDefault());
  pad.addEventListener('drop', event => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) dropped(event.dataTransfer.files[0]).catch(error => say(error.message));
  });
  $('own-file').addEventListener('change', event => { own.file = event.target.files[0]; runOwn(); });
  $('own-picture').addEventListener('change', event => { own.picture = event.target.files[0]; runOwn(); });
  stroke(18, 14, 44, 14);  // a 7, so that there is something to see
  stroke(44, 14, 28, 50);
  state.rgb = view();
  drawPad();
  // the weights come when somebody is about to look, so that the page itself is there at once
  const watcher = new IntersectionObserver(entries => {
    if (entries.some(entry => entry.isIntersecting)) { watcher.disconnect(); changed(); }
  }, {rootMargin: '200px'});
  watcher.observe($('root'));
}

if (document.readyState === 'loading') document.addEventListener('DOMContentLoaded', begin);
else begin();
return {stroke, clear, changed, take, takeDigits, takeClasses(names) { state.classes = names; }, state, models, model, answer, need, photo};
})();
