// What is seen of the canvas: drawn anew from `doc` and `selected`, which canvas.js has and changes.

function put(node, [x0, y0, x1, y1]) {
  Object.assign(node.style, {
    left: 100 * x0 + '%', top: 100 * y0 + '%', width: 100 * (x1 - x0) + '%', height: 100 * (y1 - y0) + '%',
  });
}

function show(id, box) {
  const kept = boxOf(id).box;
  boxOf(id).box = box;
  paint();
  boxOf(id).box = kept;
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
  const shown = [...doc.boxes].sort((a, b) => area(b.box) - area(a.box));
  for (const one of shown) {
    const box = node('div', 'box ' + role(one.id));
    box.dataset.box = one.id;
    put(box, one.box);
    box.classList.toggle('high', one.box[1] < 0.06);
    box.classList.toggle('left', one.box[0] < 0.15);
    box.classList.toggle('right', one.box[2] > 0.85);
    box.classList.toggle('target', !!drag && drag.over === one.id);
    const name = tag(one.phrase, 'phrase?');
    name.dataset.focus = 'box ' + one.id;
    box.append(name);
    if (isSelected('box', one.id)) {
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
    drawn += arrow(middle(boxOf(one.subject).box), middle(boxOf(one.object).box));
    const verb = tag(one.action, 'action?');
    verb.classList.add('verb');
    verb.classList.toggle('selected', isSelected('link', one.id));
    verb.dataset.link = one.id;
    verb.dataset.focus = 'link ' + one.id;
    const [x, y] = middle(where);
    Object.assign(verb.style, { left: 100 * clamp(x, 0.08, 0.92) + '%', top: 100 * clamp(y, 0.04, 0.96) + '%' });
    boxes.append(verb);
  }
  if (drag && drag.to) drawn += arrow(middle(boxOf(drag.id).box), drag.to);
  lines.innerHTML = drawn;
  if (focus) {
    const again = [...boxes.querySelectorAll('[data-focus]')].find((one) => one.dataset.focus === focus);
    (again || find('.stage')).focus({ preventScroll: true });
  }
}

function hint() {
  if (linking) return 'Now click the object';
  if (!doc.boxes.length) return '';
  if (!selected) return doc.links.length ? '' : 'Click a box to select it';
  return selected.kind === 'box' && doc.boxes.length > 1 && !doc.links.some((one) => one.subject === selected.id)
    ? 'Drag the arrow onto the object' : '';
}

function render() {
  if (linking && !boxOf(linking)) linking = null;
  if (selected && !(selected.kind === 'box' ? boxOf : link)(selected.id)) selected = null;
  const stage = find('.stage'), picture = find('.picture');
  stage.style.aspectRatio = String(doc.aspect);
  stage.style.setProperty('--aspect', doc.aspect);
  picture.hidden = find('[data-do="plain"]').hidden = !doc.picture;
  if (doc.picture && picture.getAttribute('src') !== doc.picture) picture.src = doc.picture;
  find('.empty').hidden = doc.boxes.length > 0 || !!doc.picture;
  find('[data-do="undo"]').disabled = !past.length;
  find('[data-do="redo"]').disabled = !future.length;
  find('[data-do="remove"]').disabled = !selected;
  find('[data-do="clear"]').disabled = !doc.boxes.length;
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
    if (doc.boxes.length) bar.append('Select a box or an action to name it.');
    return;
  }
  const label = (kind, id, text) => {
    const found = [...element.querySelectorAll('.tag')].find((one) => one.dataset.focus === kind + ' ' + id);
    if (found) found.textContent = text || (kind === 'box' ? 'phrase?' : 'action?');
  };
  if (selected.kind === 'box') {
    const one = boxOf(selected.id);
    bar.append(options(prefix + 'names', props.names));
    const is = { subject: 'Subject', object: 'Object', both: 'Subject and object', entity: 'Entity' }[role(one.id)];
    bar.append(field(is, one.phrase, prefix + 'names',
      (text) => edit(() => { boxOf(one.id).phrase = text; }), (text) => label('box', one.id, text)));
    if (role(one.id) === 'entity') bar.append(strength(one, boxOf));
  } else {
    const one = link(selected.id);
    bar.append(options(prefix + 'actions', props.actions));
    bar.append(node('b', '', boxOf(one.subject).phrase || 'this'));
    bar.append(field('', one.action, prefix + 'actions',
      (text) => edit(() => { link(one.id).action = text; }), (text) => label('link', one.id, text)));
    bar.append(node('b', '', boxOf(one.object).phrase || 'that'));
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
