// What the views share, for the type checker alone: nothing of this reaches a browser.

interface Theme {
  surface: string;
  ink: string;
  muted: string;
  line: string;
  accent: string;
  mark: string;
  share: string[];
  sequential: string[];
  diverging: string[];
  categories: string[];
}

/** Written by workbench_widgets/colours.py before base.js. */
declare const THEMES: { light: Theme; dark: Theme };

/** What anywidget and Panel both give a view. */
interface Model {
  // biome-ignore lint/suspicious/noExplicitAny: a host knows no types; each view names its fields'
  get(name: string): any;
  set(name: string, value: unknown): void;
  save_changes(): void;
  on(event: string, handler: () => void): void;
  off(event: string, handler: () => void): void;
}

interface Host {
  model: Model;
  el: HTMLElement;
}

interface Tooltip {
  /** Show lines of text beside a point of the window; the first line stands out. */
  tip(x: number, y: number, lines: string[]): void;
  untip(): void;
  /** Tell screen readers. */
  say(text: string): void;
}

/** One view in its host; `Fields` are those that its Python class declares. */
interface View<Fields> extends Tooltip {
  model: Model;
  root: HTMLElement;
  theme: Theme;
  get<Name extends keyof Fields>(name: Name): Fields[Name];
  commit<Name extends keyof Fields>(name: Name, value: Fields[Name]): void;
  touch(name: string): void;
}

/** An array as views/wire.py packs it. */
type Packed = DataView | null;
type Numbers = Uint8Array | Int32Array | Float32Array;
type Rgb = [number, number, number];
type Pair = [number, number];
type Paint = (dirty: Set<string>) => void;

/** What pictures and drawings (export.js) are composed with: a canvas context, or an SvgPen. */
type Pen = Pick<
  CanvasRenderingContext2D,
  | "drawImage"
  | "fillRect"
  | "fillStyle"
  | "fillText"
  | "font"
  | "imageSmoothingEnabled"
  | "imageSmoothingQuality"
  | "lineWidth"
  | "measureText"
  | "restore"
  | "rotate"
  | "save"
  | "setLineDash"
  | "strokeRect"
  | "strokeStyle"
  | "textAlign"
  | "textBaseline"
  | "translate"
>;
type Compose = (pen: Pen, width: number, height: number) => void;
