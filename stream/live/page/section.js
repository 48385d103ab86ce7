// What `stream.live.section` packed.

const TYPES = { "<f8": Float64Array, "<f4": Float32Array, "<i4": Int32Array, "<u2": Uint16Array, "|u1": Uint8Array };

/** Return the head of a section and its arrays, which look into the buffer. */
export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const arrays = {};
  for (const [name, [type, shape, offset]] of Object.entries(head.arrays)) {
    const size = shape.reduce((product, n) => product * n, 1);
    arrays[name] = new TYPES[type](buffer, 4 + length + offset, size);
    arrays[name].shape = shape;
  }
  return { head, arrays };
}
