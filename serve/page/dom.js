// The page's elements, and what it says in its footer. What comes from outside becomes text, never markup.

export const $ = (id) => document.getElementById(id);

/** An element with its attributes and listeners ("onclick": f); children are nodes or text. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

export function percent(p) {
  if (p > 0 && p < 0.0001) return "<0.01%";
  return p.toLocaleString("en", { style: "percent", maximumSignificantDigits: 3 });
}

/** The state of things, in the footer. A new state ends the last complaint. */
export function say(text) {
  $("status").textContent = text;
  $("alert").textContent = "";
}

export function complain(error) {
  $("status").textContent = "";
  $("alert").textContent = error.message;
}

/** Run `work` once at a time for this button, which keeps its focus; what goes wrong is said. */
export async function busy(button, work) {
  if (button.getAttribute("aria-disabled") === "true") return;
  button.setAttribute("aria-disabled", "true");
  try {
    await work();
  } catch (error) {
    complain(error);
  } finally {
    button.removeAttribute("aria-disabled");
  }
}
