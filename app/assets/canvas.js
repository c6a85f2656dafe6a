// The canvas: boxes with names, and links between them with actions. What it shows is `props.value`:
//   boxes [{id, phrase, box: [x0, y0, x1, y1], strength}], links [{id, subject, object, action, strength, region}],
//   aspect (width over height), picture (an address, or null), revision (a later one is never replaced by an earlier).
// Every edit of the user is one entry of the history and one 'input' event; changes that come from Python cause none.
const LEAST = 0.02; // share of the picture that a box's side has at least
const CLICK = 5; // pixels of a movement that is still a click
const find = (selector) => element.querySelector(selector);
const copy = (value) => JSON.parse(JSON.stringify(value));
const clamp = (x, low = 0, high = 1) => Math.min(high, Math.max(low, x));
const round = (x) => Math.round(x * 10000) / 10000;

let doc = filled(props.value);
let past = [], future = [];
let selected = null; // {kind: 'box' or 'link', id}
let drag = null; // what the pointer is doing
let linking = null; // the subject whose arrow was clicked

function filled(value) {
  return Object.assign({ boxes: [], links: [], aspect: 1, picture: null, revision: 0 }, copy(value || {}));
}

const boxOf = (id) => doc.boxes.find((one) => one.id === id);
const link = (id) => doc.links.find((one) => one.id === id);
const isSelected = (kind, id) => selected !== null && selected.kind === kind && selected.id === id;

function fresh(prefix) {
  const taken = new Set([...doc.boxes, ...doc.links].map((one) => one.id));
  let number = 1;
  while (taken.has(prefix + number)) number++;
  return prefix + number;
}

function role(id) {
  const acts = doc.links.some((one) => one.subject === id), suffers = doc.links.some((one) => one.object === id);
  return acts && suffers ? 'both' : acts ? 'subject' : suffers ? 'object' : 'entity';
}

// --- history ---

function edit(change) {
  const before = copy(doc);
  change();
  if (JSON.stringify(before) === JSON.stringify(doc)) return render();
  past.push(before);
  future = [];
  publish();
}

function publish() {
  doc.revision++;
  props.value = copy(doc);
  trigger('input');
  render();
}

function travel(from, to) {
  if (!from.length) return;
  const { revision, aspect } = doc; // the shape is the size's, not the canvas's
  to.push(copy(doc));
  doc = Object.assign(from.pop(), { revision, aspect });
  publish();
}

function remove() {
  if (!selected) return;
  const { kind, id } = selected;
  selected = null;
  edit(() => {
    if (kind === 'link') doc.links = doc.links.filter((one) => one.id !== id);
    else {
      doc.boxes = doc.boxes.filter((one) => one.id !== id);
      doc.links = doc.links.filter((one) => one.subject !== id && one.object !== id);
    }
  });
}

function connect(subject, object) {
  linking = null;
  if (subject === object || !boxOf(subject) || !boxOf(object)) return render();
  const same = doc.links.find((one) => one.subject === subject && one.object === object);
  const id = same ? same.id : fresh('l');
  selected = { kind: 'link', id };
  edit(() => {
    if (!same) doc.links.push({ id, subject, object, action: '', strength: 1, region: null });
  });
  focusName();
}

// --- geometry ---

function place(event) {
  const frame = find('.stage').getBoundingClientRect();
  return [clamp((event.clientX - frame.left) / frame.width), clamp((event.clientY - frame.top) / frame.height)];
}

const area = ([x0, y0, x1, y1]) => (x1 - x0) * (y1 - y0);
const inside = ([x, y], [x0, y0, x1, y1]) => x >= x0 && x <= x1 && y >= y0 && y <= y1;
const middle = ([x0, y0, x1, y1]) => [(x0 + x1) / 2, (y0 + y1) / 2];

function under(point) {
  return doc.boxes.filter((one) => inside(point, one.box)).sort((a, b) => area(a.box) - area(b.box))[0];
}

// Where the action is: the middle two of four edges along each axis, or the box around both.
function region(one) {
  const s = boxOf(one.subject).box, o = boxOf(one.object).box;
  const [a, b, c, d] = [s[0], s[2], o[0], o[2]].sort((x, y) => x - y);
  const [e, f, g, h] = [s[1], s[3], o[1], o[3]].sort((x, y) => x - y);
  return one.region === 'union' ? [a, e, d, h] : [b, f, c, g];
}

function moved(box, dx, dy) {
  const x = clamp(dx, -box[0], 1 - box[2]), y = clamp(dy, -box[1], 1 - box[3]);
  return [box[0] + x, box[1] + y, box[2] + x, box[3] + y].map(round);
}

function resized(box, edges, [x, y]) {
  let [x0, y0, x1, y1] = box;
  if (edges.includes('w')) x0 = clamp(x, 0, x1 - LEAST);
  if (edges.includes('e')) x1 = clamp(x, x0 + LEAST, 1);
  if (edges.includes('n')) y0 = clamp(y, 0, y1 - LEAST);
  if (edges.includes('s')) y1 = clamp(y, y0 + LEAST, 1);
  return [x0, y0, x1, y1].map(round);
}

// --- pointer ---

function start(event) {
  const target = event.target, stage = find('.stage');
  if (event.button > 0 || !stage.contains(target)) return;
  const point = place(event), holder = target.closest('[data-box]'), verb = target.closest('[data-link]');
  const id = holder && holder.dataset.box;
  event.preventDefault();
  stage.focus({ preventScroll: true });
  stage.setPointerCapture(event.pointerId);
  drag = { point, from: [event.clientX, event.clientY], pointer: event.pointerId, shift: event.shiftKey, kind: 'draw' };
  if (verb) Object.assign(drag, { kind: 'verb', id: verb.dataset.link });
  else if (target.matches('.linker')) Object.assign(drag, { kind: 'link', id });
  else if (target.matches('.handle')) Object.assign(drag, { kind: 'resize', id, edges: target.dataset.edges });
  else if (holder) Object.assign(drag, { kind: 'move', id });
  else if (selected && selected.kind === 'box' && inside(point, boxOf(selected.id).box))
    Object.assign(drag, { kind: 'move', id: selected.id, click: (under(point) || {}).id });
  if (drag.id && drag.kind !== 'verb') drag.box = [...boxOf(drag.id).box];
}

function far(event) {
  return Math.hypot(event.clientX - drag.from[0], event.clientY - drag.from[1]) > CLICK;
}

function move(event) {
  if (!drag || event.pointerId !== drag.pointer) return;
  if (!drag.far && !far(event)) return;
  drag.far = true;
  const point = place(event);
  if (drag.kind === 'draw') {
    const [x0, x1] = [drag.point[0], point[0]].sort((a, b) => a - b);
    const [y0, y1] = [drag.point[1], point[1]].sort((a, b) => a - b);
    drag.draft = [x0, y0, x1, y1].map(round);
    const draft = find('.draft');
    draft.hidden = false;
    put(draft, drag.draft);
    find('.empty').hidden = true;
  } else if (drag.kind === 'move' || drag.kind === 'resize') {
    if (!isSelected('box', drag.id)) selected = { kind: 'box', id: drag.id };
    const box = drag.kind === 'move'
      ? moved(drag.box, point[0] - drag.point[0], point[1] - drag.point[1])
      : resized(drag.box, drag.edges, point);
    drag.now = box;
    show(drag.id, box);
  } else if (drag.kind === 'link') {
    drag.to = point;
    drag.over = (under(point) || {}).id;
    if (drag.over === drag.id) drag.over = other(point, drag.id);
    paint();
  }
}

function other(point, id) {
  const found = doc.boxes.filter((one) => one.id !== id && inside(point, one.box));
  return (found.sort((a, b) => area(a.box) - area(b.box))[0] || {}).id;
}

function end(event) {
  if (!drag || event.pointerId !== drag.pointer) return;
  const done = drag;
  drag = null;
  find('.draft').hidden = true;
  if (event.type === 'pointercancel') return render();
  if (!done.far) return click(done);
  if (done.kind === 'draw' && done.draft) {
    const box = done.draft;
    if (box[2] - box[0] < LEAST || box[3] - box[1] < LEAST) return render();
    const id = fresh('t');
    selected = { kind: 'box', id };
    edit(() => doc.boxes.push({ id, phrase: '', box, strength: 1 }));
    focusName();
  } else if (done.now) edit(() => { boxOf(done.id).box = done.now; });
  else if (done.kind === 'link') done.over ? connect(done.id, done.over) : render();
}

function click(done) {
  const hit = done.kind === 'verb' ? null : done.kind === 'draw' ? (under(done.point) || {}).id : done.click || done.id;
  if (done.kind === 'verb') selected = { kind: 'link', id: done.id };
  else if (done.kind === 'link') linking = linking ? null : done.id;
  else if (hit && linking) return connect(linking, linking === hit ? other(done.point, linking) || hit : hit);
  else if (hit && done.shift && selected && selected.kind === 'box') {
    const object = hit === selected.id ? other(done.point, hit) : hit;
    if (object) return connect(selected.id, object);
  } else {
    linking = null;
    selected = hit ? { kind: 'box', id: hit } : null;
  }
  render();
}

// --- keyboard ---

const NUDGES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function key(event) {
  if (event.target.matches('input, select')) {
    if (event.isComposing || !['Enter', 'Escape'].includes(event.key)) return;
    if (event.key === 'Escape') event.target.value = event.target.dataset.before ?? event.target.value;
    find('.stage').focus();
    render();
    return;
  }
  if (!find('.stage').contains(event.target) && !event.target.closest('.bar')) return;
  const command = event.ctrlKey || event.metaKey, letter = event.key.toLowerCase();
  if (command && letter === 'z') event.shiftKey ? travel(future, past) : travel(past, future);
  else if (command && letter === 'y') travel(future, past);
  else if (event.key === 'Delete' || event.key === 'Backspace') remove();
  else if (event.key === 'Escape') { drag = linking = selected = null; find('.draft').hidden = true; render(); }
  else if (event.key === 'Enter' && event.target.matches('.stage') && selected) focusName();
  else if (event.key in NUDGES && selected && selected.kind === 'box') {
    const [dx, dy] = NUDGES[event.key].map((way) => way * (event.shiftKey ? 0.05 : 0.01));
    edit(() => { const one = boxOf(selected.id); one.box = moved(one.box, dx, dy); });
  } else return;
  event.preventDefault();
}

// --- wiring: on the element, so that it outlives whatever is rendered within it ---

element.addEventListener('pointerdown', start);
element.addEventListener('pointermove', move);
element.addEventListener('pointerup', end);
element.addEventListener('pointercancel', end);
element.addEventListener('keydown', key);
element.addEventListener('dblclick', (event) => { if (find('.stage').contains(event.target)) focusName(); });
element.addEventListener('focusin', (event) => {
  const at = event.target.dataset && event.target.dataset.focus;
  if (!at || drag) return;
  const [kind, id] = at.split(' ');
  if (!isSelected(kind, id)) { selected = { kind, id }; render(); }
});
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-do]');
  if (!button) return;
  if (button.dataset.do === 'undo') travel(past, future);
  if (button.dataset.do === 'redo') travel(future, past);
  if (button.dataset.do === 'remove') remove();
  if (button.dataset.do === 'plain') edit(() => { doc.picture = null; });
  if (button.dataset.do === 'clear') { selected = null; edit(() => { doc.boxes = []; doc.links = []; }); }
});
watch('value', () => {
  const value = filled(props.value);
  if (JSON.stringify(value) === JSON.stringify(doc)) return;
  // An answer to what the user has edited since, or the empty canvas of a page that is still loading.
  if (value.revision <= doc.revision) return publish();
  const layout = ({ boxes, links, picture }) => JSON.stringify([boxes, links, picture]);
  if (layout(value) !== layout(doc)) { past.push(copy(doc)); future = []; }
  doc = value;
  render();
});
// A page that is still loading may mount the canvas anew: what was drawn until then is kept.
const earlier = window.interactdiffCanvas;
if (earlier && !earlier.element.isConnected && earlier.doc().revision > doc.revision) {
  doc = copy(earlier.doc());
  props.value = copy(doc);
}
window.interactdiffCanvas = { element, doc: () => doc };
render();
