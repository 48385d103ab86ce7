// One WebSocket after the other.

import { unpack } from "./section.js";

const SLOWEST = 5000; // ms between attempts
const SILENT = 10000; // ms after which a server that tells its state every second is taken for gone

/** Call `onSection` with what comes, `onState` with whether the server is there. */
export function connect(onSection, onState) {
  let wait = 250;
  let heard;
  const open = () => {
    const url = new URL("live", location.href);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(url);
    socket.binaryType = "arraybuffer";
    const listen = () => {
      clearTimeout(heard);
      heard = setTimeout(() => socket.close(), SILENT);
    };
    listen();
    socket.onmessage = (event) => {
      listen();
      wait = 250;
      onState(true);
      const { head, arrays } = unpack(event.data);
      onSection(head, arrays);
    };
    socket.onclose = () => {
      clearTimeout(heard);
      onState(false);
      setTimeout(open, wait);
      wait = Math.min(SLOWEST, 2 * wait);
    };
  };
  open();
}
