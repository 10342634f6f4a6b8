// Creates elements, and updates them without touching what has not changed: a focused control keeps the focus.

const SVG = "http://www.w3.org/2000/svg";

export function h(tag, attributes, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes = {}, children = []) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else set(element, name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// `value` false or null: without the attribute.
export function set(element, name, value) {
  if (value === false || value === null || value === undefined) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value === true ? "" : value);
}

export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Children of `parent` that stand for the items of a list. `make(item)` gives {element, update(item)}.
export class Keyed {
  constructor(parent, make) {
    this.parent = parent;
    this.make = make;
    this.known = new Map();
  }

  // `items`: [key, item] in the order wanted.
  update(items) {
    this.removeOthers(new Set(items.map(([key]) => key)));
    let place = this.parent.firstElementChild;
    for (const [key, item] of items) {
      const view = this.known.get(key) ?? this.add(key, item);
      view.update(item);
      if (view.element === place) place = place.nextElementSibling;
      else this.parent.insertBefore(view.element, place);
    }
  }

  removeOthers(wanted) {
    for (const [key, view] of this.known) {
      if (wanted.has(key)) continue;
      view.element.remove();
      this.known.delete(key);
    }
  }

  add(key, item) {
    const view = this.make(item);
    this.known.set(key, view);
    return view;
  }
}
