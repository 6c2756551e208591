'use strict';
/* The page of the live model: what is drawn goes into model.js, and all that comes out is shown. The drawing lives in an
array of its own and is never read back from the canvas: some browsers answer that with noise. */
const live = (() => {
const SIDE = 64, GROUND = 0.2, INK = 0.85, PEN = 3.4, MEAN = 0.4, STD = 0.25, EPSILON = 1e-8;
const $ = id => document.getElementById(`live-${id}`);
const folder = document.currentScript.src.replace(/[^/]*$/, '');
const model = makeModel(), models = {}, waiting = {}, state = {
  rgb: new Float32Array(3 * SIDE * SIDE).fill(GROUND), pixel: [32, 32], kind: 't2t', result: null, before: null,
  order: shuffled(16), digits: [], said: 0, shown: 0,
};

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

/* ---- the drawing */

function clear() { state.rgb.fill(GROUND); }
function stroke(fromX, fromY, toX, toY) {
  const steps = Math.ceil(Math.hypot(toX - fromX, toY - fromY) * 2) + 1;
  for (let step = 0; step <= steps; step++) dot(fromX + (toX - fromX) * step / steps, fromY + (toY - fromY) * step / steps);
}
/* a round pen with a soft edge of one pixel */
function dot(x, y) {
  for (let row = Math.max(Math.floor(y - PEN - 1), 0); row <= Math.min(y + PEN + 1, SIDE - 1); row++) {
    for (let column = Math.max(Math.floor(x - PEN - 1), 0); column <= Math.min(x + PEN + 1, SIDE - 1); column++) {
      const part = Math.min(Math.max(PEN + 0.5 - Math.hypot(column + 0.5 - x, row + 0.5 - y), 0), 1);
      for (let c = 0; c < 3; c++) {
        const at = (c * SIDE + row) * SIDE + column;
        state.rgb[at] = Math.max(state.rgb[at], GROUND + (INK - GROUND) * part);
      }
    }
  }
}
/* the image moved by whole pixels; what comes in from outside is the edge once more */
function moved(rgb, down, right) {
  const inside = i => Math.min(Math.max(i, 0), SIDE - 1);
  return rgb.map((_, i) => {
    const c = Math.floor(i / SIDE / SIDE), row = Math.floor(i / SIDE) % SIDE, column = i % SIDE;
    return rgb[(c * SIDE + inside(row - down)) * SIDE + inside(column - right)];
  });
}
function showDigit(number) {
  const {pixels} = state.digits[number], area = SIDE * SIDE;
  state.rgb = Float32Array.from({length: 3 * area}, (_, i) => pixels[3 * (i % area) + Math.floor(i / area)] / 255);
  changed();
}
/* a file: its middle, in grey, light on dark as the model was trained */
async function dropped(file) {
  const image = photo.centreCrop(await photo.open(file), SIDE, SIDE), area = SIDE * SIDE;
  let rim = 0;
  for (let i = 0; i < SIDE; i++) for (let c = 0; c < 3; c++) rim += (image.pixels[3 * i + c] + image.pixels[3 * (area - 1 - i) + c]) / 6 / SIDE / 255;
  const dark = rim < 0.5;
  state.rgb = Float32Array.from({length: 3 * area}, (_, i) => {
    const value = image.pixels[3 * (i % area) + Math.floor(i / area)] / 255;
    return dark ? value : 1 - value;
  });
  say(dark ? '' : 'The picture was dark on light and has been inverted.');
  changed();
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

let queued = false;
function changed() {
  if (queued) return;
  queued = true;
  requestAnimationFrame(async () => {
    queued = false;
    const kind = state.kind;
    try { await need(kind); } catch (error) { return say(error.message); }
    if (kind !== state.kind) return changed();
    const start = performance.now();
    state.result = answer();
    draw();
    $('time').textContent = `${Math.max(Math.round(performance.now() - start), 1)} ms from the pixels to this page`;
    $('root').dataset.answered = ++state.shown;
  });
}

/* what one pixel of shift does to the tokens, in both models */
async function shift(down, right) {
  const before = state.rgb, after = moved(before, down, right), names = {t2t: 'T2T-ViT', vit: 'ViT'}, lines = [];
  for (const kind of ['t2t', 'vit']) {
    await need(kind);
    const [old, now] = [before, after].map(rgb => answer(kind, rgb).steps.at(-1).tokens);
    let change = 0, length = 0;
    old.forEach((value, i) => { change += (now[i] - value) ** 2; length += value ** 2; });
    lines.push(`${names[kind]}: its 16 tokens moved by ${Math.round(100 * Math.sqrt(change / length))} % of their length`);
  }
  state.rgb = after;
  $('shifted').textContent = lines.join('; ');
  changed();
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
  for (let i = 0; i < w * h; i++) data.data.set([...rgb(i), 255], 4 * i);
  canvas.getContext('2d').putImageData(data, 0, 0);
}
function heat(canvas, w, h, values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  paint(canvas, w, h, i => colour(high > low ? (values[i] - low) / (high - low) : 0.5));
  return [low, high];
}
const pixelColours = i => [0, 1, 2].map(c => 255 * state.rgb[c * SIDE * SIDE + i]);

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
  paint($('pad'), SIDE, SIDE, pixelColours);
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
  $('layers').hidden = !t2t;
  if (t2t) [1, 3].forEach((number, i) => {
    const {attention, grid} = result.steps[number], places = state.pixel.map((at, axis) => Math.floor(at * grid[axis] / SIDE));
    heat($(`layer${i + 1}`), grid[1], grid[0], attention.row(places[0] * grid[1] + places[1]));
    const silent = attention.silent.reduce((a, b) => a + b, 0);
    $(`silent${i + 1}`).textContent = `${silent} of ${attention.silent.length} tokens have a denominator below 1e-8` +
      ($('epsilon').checked ? '; with epsilon 0 they are heard all the same' : silent ? ': epsilon silences them' : '');
  });
  drawClassToken();
  const table = models[state.kind].weights.pos_embed, d = table.shape[2], rows = table.shape[1];
  let most = 0;
  for (const value of table.data) most = Math.max(most, Math.abs(value));
  const order = [0, ...($('shuffle').checked ? state.order : state.order.map((_, i) => i)).map(row => row + 1)];
  paint($('positions'), d, rows, i => signed(table.data[order[Math.floor(i / d)] * d + i % d] / most));
}

function drawSeen() {
  const scale = 6, canvas = $('seen'), overlay = $('overlay').checked, [block, head] = chosen();
  paint(canvas, SIDE, SIDE, pixelColours);
  const small = document.createElement('canvas');
  paint(small, SIDE, SIDE, pixelColours);
  canvas.width = canvas.height = SIDE * scale;
  const pen = canvas.getContext('2d');
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, 0, 0, SIDE * scale, SIDE * scale);
  if (overlay) {
    const [rows, cols] = state.result.grid, n = rows * cols + 1, weights = state.result.blocks[block].attention[head].subarray(1, n);
    const most = Math.max(...weights), cell = SIDE * scale / rows;
    weights.forEach((weight, i) => {
      pen.fillStyle = `rgba(230, 159, 0, ${0.75 * weight / most})`;
      pen.fillRect(i % cols * cell, Math.floor(i / cols) * cell, cell, cell);
    });
  }
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
  const text = `${state.kind === 't2t' ? 'T2T-ViT' : 'ViT'} reads a ${order[0]}, ${(100 * shares[order[0]]).toFixed(0)} % sure; next, ${order[1]}.`;
  clearTimeout(state.said);  // a screen reader hears the digit after a pause, not at every move
  state.said = setTimeout(() => { if ($('answer').textContent !== text) $('answer').textContent = text; }, 400);
}

function drawTable() {
  const rows = state.result.steps.map(({name, tokens, grid}) => [name, `${grid[0]} x ${grid[1]}`, grid[0] * grid[1], tokens.length / grid[0] / grid[1]]);
  const d = models[state.kind].arguments.embed_dim, depth = models[state.kind].arguments.depth;
  rows.push([`class token, positions, ${depth} blocks`, '', state.result.grid[0] * state.result.grid[1] + 1, d]);
  $('stages').replaceChildren(...rows.map(texts => {
    const row = document.createElement('tr');
    row.append(...texts.map(text => Object.assign(document.createElement('td'), {textContent: text})));
    return row;
  }));
}

/* the steps and heads that can be chosen are those of the model */
function fillSteps() {
  const steps = state.result.steps.map(step => step.name), had = $('step').value;
  if ($('step').options.length !== steps.length) {
    $('step').replaceChildren(...steps.map(name => new Option(name)));
    $('step').value = steps.includes(had) ? had : steps.find(name => name.startsWith('T2T')) ?? steps.at(-1);
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
  }
}
/* one picture of all heads: blocks downwards, heads side by side */
function drawClassToken() {
  const {blocks, grid: [rows, cols]} = state.result, heads = blocks[0].attention.length, scale = 8;
  const wide = cols * scale + 3, high = rows * scale + 3, n = rows * cols + 1;
  const most = blocks.map(({attention}) => attention.map(weights => Math.max(...weights.subarray(1, n))));
  const [block, head] = chosen();
  const w = heads * wide - 3;
  paint($('attention'), w, blocks.length * high - 3, i => {
    const x = i % w, y = Math.floor(i / w), head = Math.floor(x / wide), block = Math.floor(y / high);
    const place = [y % high, x % wide].map(along => Math.floor(along / scale));
    if (place[0] >= rows || place[1] >= cols) return [255, 255, 255];
    return colour(blocks[block].attention[head][1 + place[0] * cols + place[1]] / most[block][head]);
  });
  const weights = [...blocks[block].attention[head].subarray(0, n)], top = weights.indexOf(Math.max(...weights.slice(1)), 1) - 1;
  $('attention-facts').textContent = `Block ${block + 1}, head ${head + 1}: ${(100 * weights[0]).toFixed(0)} % stays with the class token itself; ` +
    `most of the rest goes to row ${Math.floor(top / cols) + 1}, column ${top % cols + 1} of the ${rows} x ${cols} tokens.`;
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
  if (state.result) draw();
}
function arrows(event, move) {
  const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
  if (!step) return false;
  event.preventDefault();
  const far = event.shiftKey ? 8 : 1;
  move(step[0] * far, step[1] * far);
  return true;
}

function begin() {
  document.documentElement.classList.add('live-runs');
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
    last = at(event, pad);
    dot(...last);
    point(...last);
    changed();
  });
  pad.addEventListener('pointermove', event => {
    const here = at(event, pad);
    if (last) { stroke(...last, ...here); last = here; changed(); }
    point(...here);
  });
  for (const name of ['pointerup', 'pointercancel']) pad.addEventListener(name, () => { last = null; });
  pad.addEventListener('keydown', event => {
    if (arrows(event, (down, right) => point(state.pixel[1] + right, state.pixel[0] + down))) return;
    if (event.key === ' ' || event.key === 'Enter') { event.preventDefault(); dot(state.pixel[1] + 0.5, state.pixel[0] + 0.5); changed(); }
  });
  const seen = $('seen');
  seen.addEventListener('pointermove', event => point(...at(event, seen)));
  seen.addEventListener('pointerdown', event => point(...at(event, seen)));
  seen.addEventListener('keydown', event => arrows(event, (down, right) => point(state.pixel[1] + right, state.pixel[0] + down)));
  $('attention').addEventListener('click', event => {
    const {blocks} = state.result, box = $('attention').getBoundingClientRect();
    const block = Math.floor((event.clientY - box.top) / box.height * blocks.length);
    $('looked').value = `${block},${Math.floor((event.clientX - box.left) / box.width * blocks[0].attention.length)}`;
    draw();
  });
  $('clear').addEventListener('click', () => { clear(); changed(); });
  $('invert').addEventListener('click', () => { state.rgb = state.rgb.map(value => 1 - value); changed(); });
  document.querySelectorAll('#live-digits button').forEach((button, digit) => button.addEventListener('click', async () => {
    try { await need('digits'); showDigit(digit); } catch (error) { say(error.message); }
  }));
  document.querySelectorAll('#live-root input[name=live-kind]').forEach(input => input.addEventListener('change', () => {
    state.kind = input.value;
    for (const id of ['epsilon', 'values']) $(id).disabled = state.kind === 'vit';
    changed();
  }));
  for (const id of ['epsilon', 'values', 'shuffle', 'head']) $(id).addEventListener('change', changed);
  for (const id of ['step', 'channel', 'looked', 'overlay']) $(id).addEventListener('input', () => state.result && draw());
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
  paint(pad, SIDE, SIDE, pixelColours);
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
