// The canvas of the web page; gradio runs this with `element` set to what `sketch.markup` made.
// `canvas.dataset.drawn` is set while something is on it: an untouched canvas sends nothing.
const canvas = element.querySelector('canvas');
const pen = canvas.getContext('2d');
const width = element.querySelector('input');
const before = []; // what Undo brings back
let at = null;

function wipe() {
  pen.fillStyle = '#000';
  pen.fillRect(0, 0, canvas.width, canvas.height);
  canvas.dataset.drawn = '';
}

function remember() {
  before.push([pen.getImageData(0, 0, canvas.width, canvas.height), canvas.dataset.drawn]);
  if (before.length > 20) before.shift();
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  const x = (event.clientX - box.left) * canvas.width / box.width;
  return [x, (event.clientY - box.top) * canvas.height / box.height];
}

function lineTo(to) {
  pen.strokeStyle = '#fff';
  pen.lineCap = pen.lineJoin = 'round';
  pen.lineWidth = width.value * canvas.width / 64;
  pen.beginPath();
  pen.moveTo(...at);
  pen.lineTo(...to);
  pen.stroke();
  at = to;
  canvas.dataset.drawn = 'yes';
}

canvas.addEventListener('pointerdown', event => {
  canvas.setPointerCapture(event.pointerId);
  remember();
  at = place(event);
  lineTo(at);
});
canvas.addEventListener('pointermove', event => { if (at) lineTo(place(event)); });
for (const end of ['pointerup', 'pointercancel']) canvas.addEventListener(end, () => { at = null; });

element.querySelector('[name=clear]').addEventListener('click', () => { remember(); wipe(); });
element.querySelector('[name=undo]').addEventListener('click', () => {
  const last = before.pop();
  if (!last) return;
  pen.putImageData(last[0], 0, 0);
  canvas.dataset.drawn = last[1];
});

canvas.show = url => {
  const image = new Image();
  image.onload = () => {
    remember();
    wipe();
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.dataset.drawn = 'yes';
  };
  image.src = url;
};
wipe();
