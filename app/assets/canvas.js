// The canvas: boxes with names, and links between them with actions. What it shows is `props.value`:
//   things [{id, phrase, box: [x0, y0, x1, y1], strength}], links [{id, subject, object, action, strength, region}],
//   aspect (width over height), picture (an address, or null), revision (a later one is never replaced by an earlier).
// Every edit of the user is one entry of the history and one 'input' event; Python hears nothing of its own changes.
const LEAST = 0.02; // share of the picture that a box's side has at least
const CLICK = 5; // pixels of a movement that is still a click
const find = (selector) => element.querySelector(selector);
const copy = (value) => JSON.parse(JSON.stringify(value));
const clamp = (x, low = 0, high = 1) => Math.min(high, Math.max(low, x));
const round = (x) => Math.round(x * 10000) / 10000;

let doc = filled(props.value);
let past = [], future = [];
let selected = null; // {kind: 'thing' or 'link', id}
let drag = null; // what the pointer is doing
let linking = null; // the subject whose arrow was clicked

function filled(value) {
  return Object.assign({ things: [], links: [], aspect: 1, picture: null, revision: 0 }, copy(value || {}));
}

const thing = (id) => doc.things.find((one) => one.id === id);
const link = (id) => doc.links.find((one) => one.id === id);
const isSelected = (kind, id) => selected !== null && selected.kind === kind && selected.id === id;

function fresh(prefix) {
  const taken = new Set([...doc.things, ...doc.links].map((one) => one.id));
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
  tell();
}

function tell() {
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
  tell();
}

function remove() {
  if (!selected) return;
  const { kind, id } = selected;
  selected = null;
  edit(() => {
    if (kind === 'link') doc.links = doc.links.filter((one) => one.id !== id);
    else {
      doc.things = doc.things.filter((one) => one.id !== id);
      doc.links = doc.links.filter((one) => one.subject !== id && one.object !== id);
    }
  });
}

function connect(subject, object) {
  linking = null;
  if (subject === object || !thing(subject) || !thing(object)) return render();
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
  return doc.things.filter((one) => inside(point, one.box)).sort((a, b) => area(a.box) - area(b.box))[0];
}

// Where the action is: the middle two of four edges along each axis, or the box around both.
function region(one) {
  const s = thing(one.subject).box, o = thing(one.object).box;
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
  const point = place(event), holder = target.closest('[data-thing]'), verb = target.closest('[data-link]');
  const id = holder && holder.dataset.thing;
  event.preventDefault();
  stage.focus({ preventScroll: true });
  stage.setPointerCapture(event.pointerId);
  drag = { point, from: [event.clientX, event.clientY], pointer: event.pointerId, shift: event.shiftKey, kind: 'draw' };
  if (verb) Object.assign(drag, { kind: 'verb', id: verb.dataset.link });
  else if (target.matches('.linker')) Object.assign(drag, { kind: 'link', id });
  else if (target.matches('.handle')) Object.assign(drag, { kind: 'resize', id, edges: target.dataset.edges });
  else if (holder) Object.assign(drag, { kind: 'move', id });
  else if (selected && selected.kind === 'thing' && inside(point, thing(selected.id).box))
    Object.assign(drag, { kind: 'move', id: selected.id, click: (under(point) || {}).id });
  if (drag.id && drag.kind !== 'verb') drag.box = [...thing(drag.id).box];
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
    if (!isSelected('thing', drag.id)) selected = { kind: 'thing', id: drag.id };
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
  const found = doc.things.filter((one) => one.id !== id && inside(point, one.box));
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
    selected = { kind: 'thing', id };
    edit(() => doc.things.push({ id, phrase: '', box, strength: 1 }));
    focusName();
  } else if (done.now) edit(() => { thing(done.id).box = done.now; });
  else if (done.kind === 'link') done.over ? connect(done.id, done.over) : render();
}

function click(done) {
  const hit = done.kind === 'verb' ? null : done.kind === 'draw' ? (under(done.point) || {}).id : done.click || done.id;
  if (done.kind === 'verb') selected = { kind: 'link', id: done.id };
  else if (done.kind === 'link') linking = linking ? null : done.id;
  else if (hit && linking) return connect(linking, linking === hit ? other(done.point, linking) || hit : hit);
  else if (hit && done.shift && selected && selected.kind === 'thing') {
    const object = hit === selected.id ? other(done.point, hit) : hit;
    if (object) return connect(selected.id, object);
  } else {
    linking = null;
    selected = hit ? { kind: 'thing', id: hit } : null;
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
  else if (event.key in NUDGES && selected && selected.kind === 'thing') {
    const [dx, dy] = NUDGES[event.key].map((way) => way * (event.shiftKey ? 0.05 : 0.01));
    edit(() => { const one = thing(selected.id); one.box = moved(one.box, dx, dy); });
  } else return;
  event.preventDefault();
}

// --- what is seen ---

function put(node, [x0, y0, x1, y1]) {
  Object.assign(node.style, {
    left: 100 * x0 + '%', top: 100 * y0 + '%', width: 100 * (x1 - x0) + '%', height: 100 * (y1 - y0) + '%',
  });
}

function show(id, box) {
  const kept = thing(id).box;
  thing(id).box = box;
  paint();
  thing(id).box = kept;
}

function node(kind, className, text = '') {
  const made = document.createElement(kind);
  made.className = className;
  made.textContent = text;
  if (kind === 'button') made.type = 'button';
  return made;
}

function tag(text, empty) {
  return node('button', 'tag' + (text ? '' : ' unnamed'), text || empty);
}

function paint() {
  const boxes = find('.boxes'), regions = find('.regions'), lines = find('.lines');
  const focused = document.activeElement && document.activeElement.closest('[data-focus]');
  const focus = focused && element.contains(focused) ? focused.dataset.focus : null;
  boxes.replaceChildren();
  regions.replaceChildren();
  let drawn = '<defs><marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" ' +
    'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z"/></marker></defs>';
  const arrow = ([a, b], [c, d]) =>
    `<line x1="${100 * a}%" y1="${100 * b}%" x2="${100 * c}%" y2="${100 * d}%" marker-end="url(#tip)"/>`;
  const shown = [...doc.things].sort((a, b) => area(b.box) - area(a.box));
  for (const one of shown) {
    const box = node('div', 'box ' + role(one.id));
    box.dataset.thing = one.id;
    put(box, one.box);
    box.classList.toggle('high', one.box[1] < 0.06);
    box.classList.toggle('left', one.box[0] < 0.15);
    box.classList.toggle('right', one.box[2] > 0.85);
    box.classList.toggle('target', !!drag && drag.over === one.id);
    const name = tag(one.phrase, 'name it');
    name.dataset.focus = 'thing ' + one.id;
    box.append(name);
    if (isSelected('thing', one.id)) {
      box.classList.add('selected');
      for (const edges of ['n', 's', 'w', 'e', 'nw', 'ne', 'sw', 'se']) {
        const handle = node('div', 'handle');
        handle.dataset.edges = edges;
        handle.style.left = edges.includes('w') ? 0 : edges.includes('e') ? '100%' : '50%';
        handle.style.top = edges.includes('n') ? 0 : edges.includes('s') ? '100%' : '50%';
        handle.style.cursor = edges + '-resize';
        box.append(handle);
      }
      const linker = node('button', 'linker', '\u2192');
      linker.title = 'Drag onto what it acts on, or click and then click that';
      box.append(linker);
    }
    boxes.append(box);
  }
  for (const one of doc.links) {
    const where = region(one), spot = node('div', 'region');
    put(spot, where);
    regions.append(spot);
    drawn += arrow(middle(thing(one.subject).box), middle(thing(one.object).box));
    const verb = tag(one.action, 'does what?');
    verb.classList.add('verb');
    verb.classList.toggle('selected', isSelected('link', one.id));
    verb.dataset.link = one.id;
    verb.dataset.focus = 'link ' + one.id;
    const [x, y] = middle(where);
    Object.assign(verb.style, { left: 100 * clamp(x, 0.08, 0.92) + '%', top: 100 * clamp(y, 0.04, 0.96) + '%' });
    boxes.append(verb);
  }
  if (drag && drag.to) drawn += arrow(middle(thing(drag.id).box), drag.to);
  lines.innerHTML = drawn;
  if (focus) {
    const again = [...boxes.querySelectorAll('[data-focus]')].find((one) => one.dataset.focus === focus);
    (again || find('.stage')).focus({ preventScroll: true });
  }
}

function hint() {
  if (linking) return 'Now click what it acts on';
  if (!doc.things.length) return '';
  if (!selected) return doc.links.length ? '' : 'Click a box to select it';
  return selected.kind === 'thing' && doc.things.length > 1 && !doc.links.some((one) => one.subject === selected.id)
    ? 'Drag the arrow onto what it acts on' : '';
}

function render() {
  if (linking && !thing(linking)) linking = null;
  if (selected && !(selected.kind === 'thing' ? thing : link)(selected.id)) selected = null;
  const stage = find('.stage'), picture = find('.picture');
  stage.style.aspectRatio = String(doc.aspect);
  stage.style.setProperty('--aspect', doc.aspect);
  picture.hidden = find('[data-do="plain"]').hidden = !doc.picture;
  if (doc.picture && picture.getAttribute('src') !== doc.picture) picture.src = doc.picture;
  find('.empty').hidden = doc.things.length > 0 || !!doc.picture;
  find('[data-do="undo"]').disabled = !past.length;
  find('[data-do="redo"]').disabled = !future.length;
  find('[data-do="remove"]').disabled = !selected;
  find('[data-do="clear"]').disabled = !doc.things.length;
  find('.hint').textContent = hint();
  paint();
  inspect();
}

function field(label, value, list, commit, live) {
  const holder = node('label', '', label), input = document.createElement('input');
  input.type = 'text';
  input.value = input.dataset.before = value;
  input.setAttribute('list', list);
  input.autocomplete = 'off';
  input.addEventListener('input', () => live(input.value));
  input.addEventListener('change', () => commit(input.value.trim()));
  holder.append(input);
  return holder;
}

function strength(one, now) {
  const holder = node('label', '', 'strength'), input = document.createElement('input');
  Object.assign(input, { type: 'range', min: 0, max: 2, step: 0.05, value: one.strength });
  const shown = node('span', '', Number(one.strength).toFixed(2));
  input.addEventListener('input', () => { shown.textContent = Number(input.value).toFixed(2); });
  input.addEventListener('change', () => edit(() => { now(one.id).strength = Number(input.value); }));
  holder.append(input, shown);
  return holder;
}

function options(id, words) {
  const list = document.createElement('datalist');
  list.id = id;
  for (const word of words || []) list.append(new Option(word, word));
  return list;
}

function inspect() {
  const bar = find('.inspector'), prefix = (element.id || 'canvas') + '-';
  if (bar.contains(document.activeElement) && bar.dataset.of === JSON.stringify(selected)) return;
  bar.dataset.of = JSON.stringify(selected);
  bar.replaceChildren();
  if (!selected) {
    if (doc.things.length) bar.append('Select a box or an action to name it.');
    return;
  }
  const label = (kind, id, text) => {
    const found = [...element.querySelectorAll('.tag')].find((one) => one.dataset.focus === kind + ' ' + id);
    if (found) found.textContent = text || (kind === 'thing' ? 'name it' : 'does what?');
  };
  if (selected.kind === 'thing') {
    const one = thing(selected.id);
    bar.append(options(prefix + 'names', props.names));
    const is = { subject: 'Who acts', object: 'What it is done to', both: 'Acts and is acted on', entity: 'Thing' }[role(one.id)];
    bar.append(field(is, one.phrase, prefix + 'names',
      (text) => edit(() => { thing(one.id).phrase = text; }), (text) => label('thing', one.id, text)));
    if (role(one.id) === 'entity') bar.append(strength(one, thing));
  } else {
    const one = link(selected.id);
    bar.append(options(prefix + 'actions', props.actions));
    bar.append(node('b', '', thing(one.subject).phrase || 'this'));
    bar.append(field('', one.action, prefix + 'actions',
      (text) => edit(() => { link(one.id).action = text; }), (text) => label('link', one.id, text)));
    bar.append(node('b', '', thing(one.object).phrase || 'that'));
    const where = document.createElement('select'), holder = node('label', '', 'region');
    for (const [text, value] of [["adapter's own", ''], ['between', 'between'], ['union', 'union']])
      where.append(new Option(text, value, false, (one.region || '') === value));
    where.addEventListener('change', () => edit(() => { link(one.id).region = where.value || null; }));
    holder.append(where);
    bar.append(holder, strength(one, link));
  }
}

function focusName() {
  const input = find('.inspector input[type="text"]');
  if (input) input.focus({ preventScroll: true });
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
  if (button.dataset.do === 'clear') { selected = null; edit(() => { doc.things = []; doc.links = []; }); }
});
watch('value', () => {
  const value = filled(props.value);
  if (JSON.stringify(value) === JSON.stringify(doc)) return;
  // An answer to what the user has edited since, or the empty canvas of a page that is still loading.
  if (value.revision <= doc.revision) return tell();
  const layout = ({ things, links, picture }) => JSON.stringify([things, links, picture]);
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
