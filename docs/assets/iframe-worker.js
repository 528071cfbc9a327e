// Search. Loaded before the theme, which starts a worker and sends it what a reader types.

// The two dashes of a flag would be operators of the query language: search for its words instead.
const withoutDashes = (message) =>
  typeof message?.data === "string" ? { ...message, data: message.data.replace(/(^|\s)--(?=\w)/g, "$1") } : message;

if (location.protocol === "file:") {
  // Browsers start no worker for a site that is opened from disk, so the script of the worker runs in a hidden frame, and
  // messages travel as events. The theme looks for the name IFrameWorker.
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = frame.contentDocument.createElement("script");
      this.loaded = new Promise((resolve) => script.addEventListener("load", resolve));
      script.src = url;
      frame.contentDocument.body.append(script);
    }

    postMessage(data) {
      const event = new MessageEvent("message", { data: withoutDashes(data) });
      this.loaded.then(() => this.inside.dispatchEvent(event));
    }
  };
  window.Worker = window.IFrameWorker;
} else {
  const send = Worker.prototype.postMessage;
  Worker.prototype.postMessage = function (message, ...rest) {
    return send.call(this, withoutDashes(message), ...rest);
  };
}
